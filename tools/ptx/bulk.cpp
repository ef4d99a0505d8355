// cp.async.bulk and cp.reduce.async.bulk: copies of boxes between tensors and shared memory.
#include <numeric>

#include "lanes.h"

namespace ptx {

u32 Box::bytes() const {
  u32 elements = 1;
  for (int k = 0; k < map.rank; ++k) elements *= map.box[k];
  return elements * map.element_bytes();
}

u32 Box::place(u32 offset) const {
  const u32 address = shared + offset;
  return address ^ (address >> 7 & (map.swizzle_bytes() / 16 - 1)) << 4;
}

namespace {

// What the elements outside of a tensor are read as.
std::vector<u8> filled(const Box& box) {
  std::vector<u8> data(box.bytes(), box.map.fill_nan ? 0xff : 0);
  if (box.map.fill_nan)
    for (u32 k = box.map.element_bytes() - 1; k < data.size(); k += box.map.element_bytes())
      data[k] = 0x7f;
  return data;
}

template <class F> void for_chunks(const Box& box, F f) {
  for (u32 offset = 0; offset < box.bytes(); offset += 16) f(box.place(offset), offset);
}

// Whether a copy is inside and aligned; reports it if not.
bool check_shared(const Touch& touch, const Box& box, u32 alignment) {
  const bool is_inside = touch.warp.machine.shared.inside(box.shared, box.bytes());
  if (is_inside && box.shared % alignment == 0) return true;
  touch.report(is_inside ? Kind::shared_misaligned : Kind::shared_bounds);
  return false;
}

// Call f for each row that is inside of an array, and report the others.
template <class F> void for_valid_rows(Touch touch, const Box& box, F f) {
  box.for_rows([&](u32 offset, u64 address, u32 bytes) {
    touch.address = address;
    touch.size = int(bytes);
    Trace* const trace = touch.warp.machine.trace;
    if (trace != nullptr) trace->bulk_rows(touch.warp.id, address, bytes);
    if (touch.warp.machine.global.inside(address, bytes))
      f(touch, offset);
    else
      touch.report(Kind::global_bounds);
  });
}

// ---- the operands -------------------------------------------------------------------------------

// The tensor map at an address of a parameter or of global memory.
bool read_map(Warp& warp, const Instruction& instruction, int lane, u64 address, TensorMap& map) {
  Machine& machine = warp.machine;
  if (address < u64(machine.parameters.size)) {
    if (machine.parameters.valid(warp, instruction, &address, 1, sizeof map) == 0) return false;
    std::memcpy(&map, machine.parameters.at(address), sizeof map);
  } else if (machine.global.inside(address, sizeof map)) {
    if (machine.schedule.checks)
      machine.global.check_read({warp, instruction, u8(lane), address, sizeof map});
    std::memcpy(&map, machine.global.at(address), sizeof map);
  }
  if (map.is_valid()) return true;
  machine.faults.add(Kind::tensor_map, warp, instruction, lane, 0, 0);
  return false;
}

// Operands: shared address, offset, address of the tensor map, offset, number of coordinates,
// coordinates.
bool read_tensor_box(Warp& warp, const Instruction& instruction, const i32* o, int lane, Box& box) {
  const u64 map = warp.at<u64>(o[2])[lane] + u64(i64(o[3]));
  if (!read_map(warp, instruction, lane, map, box.map)) return false;
  box.shared = warp.at<u32>(o[0])[lane] + u32(o[1]);
  for (int k = 0; k < o[4]; ++k) box.start[k] = warp.at<i32>(o[5 + k])[lane];
  if (o[4] != box.map.rank)
    warp.machine.faults.add(Kind::tensor_map, warp, instruction, lane, 0, 0);
  return o[4] == box.map.rank &&
         check_shared({warp, instruction, u8(lane), box.shared, 16}, box, 128);
}

// Operands: shared address, offset, global address, offset, bytes, the number of an element's type.
bool read_bytes_box(Warp& warp, const Instruction& instruction, const i32* o, int lane, Box& box) {
  box.map.rank = 1;
  box.map.element = u8(o[5]);
  box.map.address = warp.at<u64>(o[2])[lane] + u64(i64(o[3]));
  box.map.box[0] = warp.at<u32>(o[4])[lane] / box.map.element_bytes();
  box.map.dims[0] = box.map.box[0];
  box.shared = warp.at<u32>(o[0])[lane] + u32(o[1]);
  const Touch from{warp, instruction, u8(lane), box.map.address, 16};
  if (box.map.address % 16 != 0) from.report(Kind::global_misaligned);
  return box.map.address % 16 == 0 && box.bytes() % 16 == 0 &&
         check_shared({warp, instruction, u8(lane), box.shared, 16}, box, 16);
}

// ---- to shared memory ---------------------------------------------------------------------------

void issue(Warp& warp, BulkLoad& load, MBarrier& barrier) {
  Machine& machine = warp.machine;
  const bool checks = machine.schedule.checks;
  const Touch touch{warp,    *load.instruction, u8(load.lane), 0, 16, Access::bulk,
                    nullptr, barrier.index,     barrier.phase};
  load.data = filled(load.box);
  for_valid_rows(touch, load.box, [&](const Touch& row, u32 offset) {
    if (checks) machine.global.check_read(row);
    std::memcpy(load.data.data() + offset, machine.global.at(row.address), row.size);
  });
  for_chunks(load.box, [&](u32 address, u32) {
    Touch chunk = touch;
    chunk.address = address;
    if (checks) machine.shared.check_write(chunk);
    if (machine.schedule.late_copies) std::memset(machine.shared.at(address), 0xff, 16);
  });
}

void start_load(Warp& warp, const Instruction& instruction, int lane, const Box& box, u32 address) {
  MBarrier* barrier = find_mbarrier(warp, instruction, lane, address, Access::mbarrier);
  if (barrier == nullptr) return;
  if (Trace* const trace = warp.machine.trace) {
    trace->bulk_shared(warp.id, box.bytes());
    trace->mbarrier(warp.id, barrier->index, barrier->phase);
  }
  BulkLoad load{&instruction, warp.id, lane, barrier->phase, box};
  barrier->last = load;
  issue(warp, load, *barrier);
  if (warp.machine.schedule.late_copies)
    barrier->late.push_back(std::move(load));
  else
    land(warp.machine, *barrier, load);
}

// Operands: those of a box, then the address of an mbarrier and its offset.
template <auto READ_BOX> void load(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  const i32* barrier = o + instruction.count - 2;
  for_each_lane(lanes, [&](int lane) {
    Box box;
    if (READ_BOX(warp, instruction, o, lane, box))
      start_load(warp, instruction, lane, box, warp.at<u32>(barrier[0])[lane] + u32(barrier[1]));
  });
}

}  // namespace

void land(Machine& machine, MBarrier& barrier, const BulkLoad& load) {
  if (load.phase != barrier.phase) report_unexpected(machine, barrier, load);
  for_chunks(load.box, [&](u32 address, u32 offset) {
    std::memcpy(machine.shared.at(address), load.data.data() + offset, 16);
  });
  expect_bytes(machine, barrier, -i64(load.box.bytes()));
}

void Machine::land_awaited() {
  for (const Warp& warp : warps) {
    const auto found = mbarriers.find(warp.waiting.address);
    if (warp.state != State::blocked || found == mbarriers.end()) continue;
    MBarrier& barrier = found->second;
    const u32 phase = barrier.phase;
    while (!barrier.late.empty() && barrier.phase == phase) {
      const BulkLoad load = std::move(barrier.late.front());
      barrier.late.pop_front();
      land(*this, barrier, load);
    }
  }
}

// ---- from shared memory -------------------------------------------------------------------------

namespace {

// In the order of translate's REDUCTIONS; 0 is a plain store.
enum Reduction { STORE, ADD, MIN, MAX, AND, OR, XOR };

template <class T> T combine_integers(int reduction, T a, T b) {
  switch (reduction) {
    case ADD:
      return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
    case MIN:
      return std::min(a, b);
    case MAX:
      return std::max(a, b);
    case AND:
      return a & b;
    case OR:
      return a | b;
    default:
      return a ^ b;
  }
}

template <class T> T combine_floats(int reduction, T a, T b) {
  return reduction == ADD ? a + b : reduction == MIN ? std::fmin(a, b) : std::fmax(a, b);
}

// Apply a function to the elements at `to` and at `from`.
template <class T, class F> void combine_all(u8* to, const u8* from, u32 bytes, F f) {
  for (u32 at = 0; at < bytes; at += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + at, sizeof a);
    std::memcpy(&b, from + at, sizeof b);
    a = f(a, b);
    std::memcpy(to + at, &a, sizeof a);
  }
}

void combine(const TensorMap& map, int reduction, u8* to, const u8* from, u32 bytes) {
  const auto integers = [&](auto a, auto b) { return combine_integers(reduction, a, b); };
  const auto floats = [&](auto a, auto b) { return combine_floats(reduction, a, b); };
  switch (map.element) {
    case 2:
      return combine_all<u32>(to, from, bytes, integers);
    case 3:
      return combine_all<i32>(to, from, bytes, integers);
    case 4:
      return combine_all<u64>(to, from, bytes, integers);
    case 5:
      return combine_all<i64>(to, from, bytes, integers);
    case 6:
      return combine_all<f16>(to, from, bytes,
                              [&](f16 a, f16 b) { return to_f16(floats(widen(a), widen(b))); });
    case 10:
      return combine_all<bf16>(to, from, bytes,
                               [&](bf16 a, bf16 b) { return to_bf16(floats(widen(a), widen(b))); });
    case 9:
      return combine_all<f64>(to, from, bytes, floats);
    default:
      return combine_all<f32>(to, from, bytes, floats);
  }
}

bool can_combine(const TensorMap& map, int reduction) {
  return reduction == STORE || (map.element >= 2 && (reduction < AND || !map.is_float()));
}

void read_shared(Machine& machine, BulkStore& store) {
  if (store.has_read) return;
  store.has_read = true;
  store.data.resize(store.box.bytes());
  for_chunks(store.box, [&](u32 address, u32 offset) {
    std::memcpy(store.data.data() + offset, machine.shared.at(address), 16);
  });
}

void write_global(Machine& machine, BulkStore& store) {
  if (store.has_written) return;
  store.has_written = true;
  store.box.for_rows([&](u32 offset, u64 address, u32 bytes) {
    if (!machine.global.inside(address, bytes)) return;
    u8* to = machine.global.at(address);
    const u8* from = store.data.data() + offset;
    if (store.reduction == STORE)
      std::memcpy(to, from, bytes);
    else
      combine(store.box.map, store.reduction, to, from, bytes);
  });
}

void check_store(Warp& warp, const BulkStore& store) {
  Machine& machine = warp.machine;
  const Access access = store.reduction == STORE ? Access::bulk : Access::bulk_atomic;
  const Touch touch{warp, *store.instruction, u8(store.lane), 0, 16, access};
  for_valid_rows(touch, store.box, [&](const Touch& row, u32) {
    if (machine.schedule.checks) machine.global.check_write(row);
  });
  if (machine.schedule.checks)
    for_chunks(store.box, [&](u32 address, u32) {
      Touch chunk = touch;
      chunk.address = address;
      machine.shared.check_read(chunk);
    });
}

// Operands: those of a box, then the number of a reduction.
template <auto READ_BOX> void store(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  for_each_lane(lanes, [&](int lane) {
    Box box;
    if (!READ_BOX(warp, instruction, o, lane, box)) return;
    const int reduction = o[instruction.count - 1];
    if (!can_combine(box.map, reduction))
      return warp.machine.faults.add(Kind::tensor_map, warp, instruction, lane, 0, 0);
    if (++warp.store_clock >= LAST_CLOCK) throw ClockOverflow{};
    BulkStore store{
        &instruction, lane, warp.bulk_commits[lane] + 1, ++warp.stores_issued, warp.store_clock,
        reduction,    box};
    if (warp.machine.trace != nullptr) warp.machine.trace->bulk_shared(warp.id, box.bytes());
    check_store(warp, store);
    if (!warp.machine.schedule.late_wgmma) {
      read_shared(warp.machine, store);
      write_global(warp.machine, store);
    }
    warp.stores.push_back(std::move(store));
  });
}

void commit(Warp& warp, const Instruction&, u32 lanes) {
  for_each_lane(lanes, [&](int lane) { ++warp.bulk_commits[lane]; });
}

// What is known of the copies of a warp: all up to the first that has not been waited for.
void note_waited(Warp& warp) {
  for (const BulkStore& store : warp.stores) {
    if (!store.waited_read) return;
    warp.finished[FIRST_STORES + warp.id] = store.number;
  }
}

void note_written(Warp& warp) {
  for (; !warp.stores.empty() && warp.stores.front().waited; warp.stores.pop_front())
    warp.clocks[MAX_WARPS + warp.id] = warp.stores.front().clock;
}

// Operand: how many groups of each thread may remain unfinished. After .read they may still write.
template <bool READ> void wait_group(Warp& warp, const Instruction& instruction, u32 lanes) {
  for (BulkStore& store : warp.stores) {
    if (!(lanes >> store.lane & 1)) continue;
    if (store.group > warp.bulk_commits[store.lane] - instruction.operands[0]) continue;
    read_shared(warp.machine, store);
    store.waited_read = true;
    if (READ) continue;
    write_global(warp.machine, store);
    store.waited = true;
  }
  note_waited(warp);
  note_written(warp);
}

const Register bulk_opcodes[] = {
    {"cp.async.bulk.tensor.load", load<read_tensor_box>},
    {"cp.async.bulk.tensor.store", store<read_tensor_box>},
    {"cp.async.bulk.load", load<read_bytes_box>},
    {"cp.async.bulk.store", store<read_bytes_box>},
    {"cp.async.bulk.commit_group", commit},
    {"cp.async.bulk.wait_group", wait_group<false>},
    {"cp.async.bulk.wait_group.read", wait_group<true>},
};

}  // namespace

void Machine::end_block() {
  const bool is_done = std::all_of(warps.begin(), warps.end(),
                                   [](const Warp& warp) { return warp.state == State::done; });
  for (Warp& warp : warps)
    for (BulkStore& store : warp.stores) {
      read_shared(*this, store);
      write_global(*this, store);
    }
  if (!is_done || !schedule.checks) return;
  for (const auto& [address, barrier] : mbarriers)
    if (barrier.is_valid) report_left(*this, barrier);
}

}  // namespace ptx
