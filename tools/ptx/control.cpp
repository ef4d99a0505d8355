// Branches, barriers, fences, and instructions in which the lanes of a warp exchange values.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace ptx {

// Lanes at the earliest place run first, so that lanes which a branch divided meet again after it.
void Warp::settle() {
  if (active != 0) elsewhere.push_back({pc, active});
  if (elsewhere.empty()) {
    state = State::done;
    if (machine.schedule.checks) report_unfinished();
    ++machine.progress;
    machine.release_barriers();
    return;
  }
  const auto place = [&](const Lanes& lanes) { return machine.code[lanes.pc].place; };
  const auto first = [&](const Lanes& a, const Lanes& b) { return place(a) < place(b); };
  pc = std::min_element(elsewhere.begin(), elsewhere.end(), first)->pc;
  active = 0;
  for (const Lanes& lanes : elsewhere) active |= lanes.pc == pc ? lanes.mask : 0;
  std::erase_if(elsewhere, [&](const Lanes& lanes) { return lanes.pc == pc; });
  const auto next = std::min_element(elsewhere.begin(), elsewhere.end(), first);
  merge_place = next == elsewhere.end() ? std::numeric_limits<int>::max() : place(*next);
}

// The given lanes continue at another pc, the other active lanes here.
void Warp::split(int other_pc, u32 lanes) {
  active &= ~lanes;
  elsewhere.push_back({other_pc, lanes});
  settle();
}

// A warp must not end before its asynchronous work.
void Warp::report_unfinished() {
  const auto report = [&](const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
      if (copy.lanes == 0) continue;
      const int lane = std::countr_zero(copy.lanes);
      machine.faults.add(Kind::unfinished, *this, *copy.instruction, lane, copy.to[lane],
                         copy.size);
    }
  };
  report(open_copies);
  for (const std::vector<Copy>& group : copies) report(group);
  for (const BulkStore& store : stores)
    if (!store.waited_read)
      machine.faults.add(Kind::unfinished, *this, *store.instruction, store.lane, 0, 0);
  for (const Delayed& late : delayed)
    machine.faults.add(Kind::unfinished, *this, *late.instruction, NO_LANE, 0, 0);
}

void Warp::tick() {
  if (++clocks[id] >= LAST_CLOCK && machine.schedule.checks) throw ClockOverflow{};
}

u32 Warp::alive() const {
  u32 lanes = active;
  for (const Lanes& others : elsewhere) lanes |= others.mask;
  return lanes;
}

void Warp::expect(const Instruction& instruction, u32 lanes, u32 needed) {
  const u32 missing = needed & ~lanes;
  if (missing != 0)
    machine.faults.add(Kind::divergence, *this, instruction, std::countr_zero(missing), 0, 0);
}

// ---- barriers -----------------------------------------------------------------------------------

void Machine::arrive(Warp& warp, int id, int expected, bool waits) {
  if (trace != nullptr) trace->barrier(warp.id, id, expected);
  Barrier& barrier = barriers[id];
  barrier.arrived += 32;
  barrier.expected = expected;
  barrier.known.join(warp);
  ++progress;
  warp.tick();
  warp.barrier = id;
  if (waits) warp.state = State::at_barrier;
  release_barriers();
}

// Let the warps of complete barriers continue. Each then knows all that the others did before the
// barrier.
void Machine::release_barriers() {
  int threads = 0;
  for (const Warp& warp : warps) threads += warp.state == State::done ? 0 : 32;
  for (int id = 0; id < int(barriers.size()); ++id) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived == 0 || barrier.arrived < (barrier.expected ? barrier.expected : threads))
      continue;
    for (Warp& warp : warps) {
      if (warp.state != State::at_barrier || warp.barrier != id) continue;
      warp.join(barrier.known);
      warp.state = State::ready;
    }
    barrier = {};
  }
}

// A mask names the lanes that must execute an instruction together, unless they have returned.
// Operand: the mask.
void expect_named(Warp& warp, const Instruction& instruction, u32 lanes, i32 operand) {
  const u32 *masks = warp.at<u32>(operand), alive = warp.alive();
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1)
      warp.expect(instruction, lanes & masks[lane], (masks[lane] & alive) | 1u << lane);
}

namespace {

// Operands: barrier, threads (0: all).
template <bool WAITS> void barrier(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, warp.alive());
  if (WAITS) warp.sync_lanes();
  const int id = warp.at<u32>(instruction.operands[0])[0] & 15;
  const int threads =
      instruction.operands[1] < 0 ? 0 : int(warp.at<u32>(instruction.operands[1])[0]);
  warp.machine.arrive(warp, id, threads, WAITS);
}

void warp_barrier(Warp& warp, const Instruction& instruction, u32 lanes) {
  expect_named(warp, instruction, lanes, instruction.operands[0]);
  warp.sync_lanes();
  warp.tick();
}

// Accesses before this fence become visible to asynchronous reads; those after it need another.
void proxy_fence(Warp& warp, const Instruction&, u32) {
  for (int k = 0; k < AGENTS; ++k) warp.fenced[k] = std::max(warp.fenced[k], warp.clocks[k]);
  warp.tick();
}

void nothing(Warp&, const Instruction&, u32) {}

// ---- branches -----------------------------------------------------------------------------------

// Operand: the pc to continue at.
void branch(Warp& warp, const Instruction& instruction, u32 lanes) {
  if (lanes == warp.active)
    warp.pc = instruction.operands[0];
  else
    warp.split(instruction.operands[0], lanes);
}

// Operands: an index, and the pc for each value of it.
void branch_by_index(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32* chosen = warp.at<u32>(instruction.operands[0]);
  warp.active &= ~lanes;
  for_each_lane(lanes, [&](int lane) {
    if (int(chosen[lane]) < instruction.count - 1)
      warp.elsewhere.push_back({instruction.operands[1 + chosen[lane]], 1u << lane});
    else
      warp.machine.faults.add(Kind::branch_bounds, warp, instruction, lane, 0, 0);
  });
  warp.settle();
}

void leave(Warp& warp, const Instruction&, u32 lanes) {
  warp.active &= ~lanes;
  if (warp.active == 0) warp.settle();
}

const Register control_opcodes[] = {
    {"bra", branch},
    {"brx.idx", branch_by_index},
    {"ret", leave},
    {"bar.sync", barrier<true>},
    {"bar.arrive", barrier<false>},
    {"bar.warp.sync", warp_barrier},
    {"fence.proxy.async", proxy_fence},
    {"nothing", nothing},
};

// ---- exchange between lanes ---------------------------------------------------------------------

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// Operands: destination, predicate "the source is in range" (-1: not wanted), value, distance,
// segment, mask.
template <Shuffle MODE> void shuffle(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  expect_named(warp, instruction, lanes, o[5]);
  const u32 *values = warp.at<u32>(o[2]), *distances = warp.at<u32>(o[3]),
            *segments = warp.at<u32>(o[4]);
  u32 cells[32], in_range = 0, sources = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const int segment = segments[lane] >> 8 & 31, clamp = segments[lane] & 31,
              distance = distances[lane] & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    const int from = MODE == UP          ? lane - distance
                     : MODE == DOWN      ? lane + distance
                     : MODE == BUTTERFLY ? lane ^ distance
                                         : first | (distance & ~segment);
    const bool ok = MODE == UP ? from >= last : from <= last;
    in_range |= u32(ok) << lane;
    cells[lane] = values[ok ? from : lane];
    if (lanes >> lane & 1) sources |= 1u << (ok ? from : lane);
  }
  warp.expect(instruction, lanes, sources);
  put(warp.registers + o[0], cells, lanes);
  if (o[1] >= 0) put_predicate(warp.registers + o[1], in_range, lanes);
}

// Operands: destination, value or predicate, mask. F computes the result of a lane from the lanes
// in the mask.
template <class F> struct Exchange {
  static void run(Warp& warp, const Instruction& instruction, u32 lanes) {
    const i32* o = instruction.operands;
    expect_named(warp, instruction, lanes, o[2]);
    const u32* masks = warp.at<u32>(o[2]);
    u32 cells[32];
    for (int lane = 0; lane < 32; ++lane)
      cells[lane] = F{}(warp.at<u32>(o[1]), lane, masks[lane] & lanes);
    put(warp.registers + o[0], cells, lanes);
  }
};

template <class F> void register_exchange(const std::string& name, F) {
  Register(name, Exchange<F>::run);
}

template <class T, class F> void register_reduction(const std::string& name, F) {
  register_exchange("redux." + name, [](const u32* values, int lane, u32 others) {
    T sum = T(values[lane]);
    for_each_lane(others & ~(1u << lane), [&](int other) { sum = F{}(sum, T(values[other])); });
    return u32(sum);
  });
}

const bool exchanges_registered = [] {
  register_reduction<u32>("add.s32", [](u32 a, u32 b) { return a + b; });
  register_reduction<u32>("add.u32", [](u32 a, u32 b) { return a + b; });
  register_reduction<i32>("max.s32", [](i32 a, i32 b) { return std::max(a, b); });
  register_reduction<i32>("min.s32", [](i32 a, i32 b) { return std::min(a, b); });
  register_reduction<u32>("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  register_reduction<u32>("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  register_reduction<u32>("and.b32", [](u32 a, u32 b) { return a & b; });
  register_reduction<u32>("or.b32", [](u32 a, u32 b) { return a | b; });
  register_reduction<u32>("xor.b32", [](u32 a, u32 b) { return a ^ b; });
  register_exchange("vote.ballot.b32",
                    [](const u32* votes, int, u32 others) { return *votes & others; });
  register_exchange("match.any.b32", [](const u32* values, int lane, u32 others) {
    u32 equal = 0;
    for_each_lane(others, [&](int other) { equal |= u32(values[other] == values[lane]) << other; });
    return equal;
  });
  return true;
}();

void active_mask(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 cells[32];
  std::fill_n(cells, 32, lanes);
  put(warp.registers + instruction.operands[0], cells, lanes);
}

const Register exchange_opcodes[] = {
    {"shfl.up.b32", shuffle<UP>},          {"shfl.down.b32", shuffle<DOWN>},
    {"shfl.bfly.b32", shuffle<BUTTERFLY>}, {"shfl.idx.b32", shuffle<INDEX>},
    {"activemask.b32", active_mask},
};

}  // namespace
}  // namespace ptx
