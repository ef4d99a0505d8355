// mbarrier: barriers in shared memory that count arrivals, and the bytes that bulk copies bring.
//
// A phase is complete when it lacks neither arrivals nor bytes. Who waits for it then knows what
// all that arrived knew, and that the copies of the phase have landed.
#include "mbarrier.h"

#include "lanes.h"

namespace ptx {

void report_unexpected(Machine& machine, const MBarrier& barrier, const BulkLoad& load) {
  machine.faults.add(Kind::too_few_bytes, machine.warps[load.warp], *load.instruction, load.lane,
                     barrier.address, int(load.box.bytes()));
}

namespace {

void complete_phase(Machine& machine, MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.complete.join(barrier.arrived);
  std::vector<u32>& landed = barrier.complete.landed;
  if (int(landed.size()) <= barrier.index) landed.resize(barrier.index + 1);
  landed[barrier.index] = barrier.phase;
  barrier.arrived = {};
  barrier.pending = barrier.count;
  for (const BulkLoad& load : barrier.late) report_unexpected(machine, barrier, load);
  for (Warp& warp : machine.warps)
    if (warp.state == State::blocked && warp.waiting.address == barrier.address)
      warp.state = State::ready;
}

// The lanes of one instruction mostly name one barrier.
class Barriers {
 public:
  Barriers(Warp& warp, const Instruction& instruction, i32 base, i32 offset, u32 lanes,
           Access access = Access::mbarrier)
      : warp_(warp),
        instruction_(instruction),
        access_(access),
        last_lane_(31 - std::countl_zero(lanes)) {
    const u32* from = warp.at<u32>(base);
    for (int lane = 0; lane < 32; ++lane) addresses_[lane] = from[lane] + u32(offset);
  }

  MBarrier* at(int lane) {
    if (found_ == nullptr || found_->address != addresses_[lane] || lane == last_lane_)
      found_ = find_mbarrier(warp_, instruction_, lane, addresses_[lane], access_);
    return found_;
  }

 private:
  Warp& warp_;
  const Instruction& instruction_;
  Access access_;
  int last_lane_;
  u32 addresses_[32];
  MBarrier* found_ = nullptr;
};

bool check_access(Warp& warp, const Instruction& instruction, int lane, u32 address,
                  Access access) {
  SharedMemory& shared = warp.machine.shared;
  if (shared.valid(warp, instruction, &address, 1, 8) == 0) return false;
  const Touch touch{warp, instruction, u8(lane), address, 8, access};
  if (warp.machine.schedule.checks && access == Access::poll)
    shared.check_read(touch);
  else if (warp.machine.schedule.checks)
    shared.check_write(touch);
  return true;
}

}  // namespace

MBarrier* find_mbarrier(Warp& warp, const Instruction& instruction, int lane, u32 address,
                        Access access) {
  const auto found = warp.machine.mbarriers.find(address);
  if (found == warp.machine.mbarriers.end() || !found->second.is_valid) {
    Touch{warp, instruction, u8(lane), address, 8}.report(Kind::no_mbarrier);
    return nullptr;
  }
  check_access(warp, instruction, lane, address, access);
  return &found->second;
}

void expect_bytes(Machine& machine, MBarrier& barrier, i64 bytes) {
  barrier.bytes += bytes;
  ++machine.progress;
  complete_phase(machine, barrier);
}

void report_left(Machine& machine, const MBarrier& barrier) {
  const BulkLoad& last = barrier.last;
  const Warp& warp = machine.warps[last.warp];
  const Instruction* expect = barrier.last_expect ? barrier.last_expect : last.instruction;
  i64 bytes = barrier.bytes;
  for (const BulkLoad& load : barrier.late) bytes -= load.box.bytes();
  if (bytes != 0)
    machine.faults.add(Kind::bytes_left, warp, *expect, last.lane, barrier.address,
                       int(std::abs(bytes)));
  if (last.instruction != nullptr && last.phase >= barrier.phases_waited_for)
    machine.faults.add(Kind::abandoned, warp, *last.instruction, last.lane, barrier.address, 8);
}

bool report_mbarrier(const Warp& warp) {
  const auto found = warp.machine.mbarriers.find(warp.waiting.address);
  if (found == warp.machine.mbarriers.end()) return false;
  const MBarrier& barrier = found->second;
  const Kind kind = barrier.pending != 0 ? Kind::lacks_arrivals
                    : barrier.bytes > 0  ? Kind::lacks_bytes
                                         : Kind::has_bytes;
  const i64 size = barrier.pending != 0 ? 8 : std::abs(barrier.bytes);
  warp.machine.faults.add(kind, warp, *warp.waiting.instruction, 0, barrier.address, int(size));
  return true;
}

namespace {

// Operands: address, offset, arrivals of each phase.
void init(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  std::map<u32, MBarrier>& all = warp.machine.mbarriers;
  for_each_lane(lanes, [&](int lane) {
    const u32 address = warp.at<u32>(o[0])[lane] + u32(o[1]);
    if (!check_access(warp, instruction, lane, address, Access::plain)) return;
    MBarrier& barrier = all.try_emplace(address, MBarrier{int(all.size()), address}).first->second;
    if (barrier.is_valid)
      Touch{warp, instruction, u8(lane), address, 8}.report(Kind::mbarrier_in_use);
    barrier.is_valid = true;
    barrier.count = barrier.pending = warp.at<u32>(o[2])[lane];
    barrier.bytes = 0;
    barrier.first_phase = barrier.phase;
    barrier.arrived = {};
  });
}

// Operands: address, offset.
void invalidate(Warp& warp, const Instruction& instruction, u32 lanes) {
  Barriers barriers(warp, instruction, instruction.operands[0], instruction.operands[1], lanes,
                    Access::plain);
  for_each_lane(lanes, [&](int lane) {
    MBarrier* barrier = barriers.at(lane);
    if (barrier == nullptr) return;
    report_left(warp.machine, *barrier);
    barrier->is_valid = false;
    barrier->late.clear();
    ++barrier->phase;  // what is in flight never lands
  });
}

// Operands: the state before (-1: not wanted), address, offset, arrivals, bytes to expect (-1:
// none).
void arrive(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  Barriers barriers(warp, instruction, o[1], o[2], lanes);
  u64 states[32] = {};
  for_each_lane(lanes, [&](int lane) {
    MBarrier* barrier = barriers.at(lane);
    if (barrier == nullptr) return;
    const u32 count = warp.at<u32>(o[3])[lane];
    Trace* const trace = warp.machine.trace;
    if (trace != nullptr) trace->mbarrier(warp.id, barrier->index, barrier->phase);
    states[lane] = u64(barrier->phase) << 32 | barrier->pending;
    if (count > barrier->pending)
      Touch{warp, instruction, u8(lane), barrier->address, 8}.report(Kind::too_many_arrivals);
    barrier->arrived.join(warp);
    barrier->last_expect = &instruction;
    if (o[4] >= 0) barrier->bytes += warp.at<u32>(o[4])[lane];
    barrier->pending -= std::min(count, barrier->pending);
    expect_bytes(warp.machine, *barrier, 0);
  });
  warp.tick();
  if (o[0] >= 0) put(warp.registers + o[0], states, lanes);
}

// Operands: address, offset, bytes.
template <int SIGN> void expect(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  Barriers barriers(warp, instruction, o[0], o[1], lanes);
  for_each_lane(lanes, [&](int lane) {
    MBarrier* barrier = barriers.at(lane);
    if (barrier == nullptr) return;
    barrier->last_expect = &instruction;
    expect_bytes(warp.machine, *barrier, SIGN * i64(warp.at<u32>(o[2])[lane]));
  });
}

// Operands: a predicate, address, offset, and the parity of a phase, or the state before an
// arrival. A warp that finds the phase incomplete lets others run. try_wait then looks again, and
// returns false only where no other warp could run; test_wait returns false.
template <bool PARITY, bool TRIES>
void wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  Barriers barriers(warp, instruction, o[1], o[2], lanes, Access::poll);
  u32 complete = 0, awaited = 0;
  const MBarrier* joined = nullptr;
  for_each_lane(lanes, [&](int lane) {
    MBarrier* barrier = barriers.at(lane);
    const bool is_complete =
        barrier == nullptr ||
        (PARITY ? (barrier->phase - barrier->first_phase) % 2 != warp.at<u32>(o[3])[lane] % 2
                : barrier->phase > warp.at<u64>(o[3])[lane] >> 32);
    complete |= u32(is_complete) << lane;
    if (!is_complete) awaited = barrier->address;
    if (!is_complete || barrier == nullptr || barrier == joined) return;
    warp.join(barrier->complete);
    Trace* const trace = warp.machine.trace;
    if (trace != nullptr && barrier->phase > barrier->first_phase)
      trace->mbarrier(warp.id, barrier->index, barrier->phase - 1);
    barrier->phases_waited_for = barrier->phase;
    joined = barrier;
  });
  const bool looks_again = TRIES && awaited != 0 &&
                           !(warp.waiting.has_tried && warp.waiting.instruction == &instruction);
  warp.waiting = {awaited, &instruction, looks_again};
  if (awaited != 0 && (looks_again || !TRIES)) warp.state = State::blocked;
  if (looks_again)
    --warp.pc;
  else
    put_predicate(warp.registers + o[0], complete, lanes);
}

// Operands: destination, the state before an arrival.
void pending_count(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 counts[32];
  for (int lane = 0; lane < 32; ++lane)
    counts[lane] = u32(warp.at<u64>(instruction.operands[1])[lane]);
  put(warp.registers + instruction.operands[0], counts, lanes);
}

const Register mbarrier_opcodes[] = {
    {"mbarrier.init", init},
    {"mbarrier.inval", invalidate},
    {"mbarrier.arrive", arrive},
    {"mbarrier.expect_tx", expect<1>},
    {"mbarrier.complete_tx", expect<-1>},
    {"mbarrier.test_wait", wait<false, false>},
    {"mbarrier.test_wait.parity", wait<true, false>},
    {"mbarrier.try_wait", wait<false, true>},
    {"mbarrier.try_wait.parity", wait<true, true>},
    {"mbarrier.pending_count", pending_count},
};

}  // namespace
}  // namespace ptx
