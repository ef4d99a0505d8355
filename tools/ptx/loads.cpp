// Loads and stores, atomics, ldmatrix, stmatrix and cp.async.
//
// Operands of ld.SPACE.BITSxCOUNT: destinations, base address, offset. Of st.SPACE.BITSxCOUNT: base
// address, offset, values.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

template <class A> void addresses_of(const Warp& warp, i32 base, i32 offset, A* addresses) {
  const A* from = warp.at<A>(base);
  for (int lane = 0; lane < 32; ++lane) addresses[lane] = from[lane] + A(i64(offset));
}

// COUNT values of type T of each lane, as they lie in memory.
template <class T, int COUNT> struct Vectors {
  T values[32][COUNT];

  const u8* bytes(int lane) const { return reinterpret_cast<const u8*>(values[lane]); }

  void to_registers(Warp& warp, const i32* registers, u32 lanes) const {
    for (int k = 0; k < COUNT; ++k) {
      if (registers[k] < 0) continue;
      Cell<T> cells[32];
      for (int lane = 0; lane < 32; ++lane) cells[lane] = values[lane][k];
      put(warp.registers + registers[k], cells, lanes);
    }
  }

  void from_registers(const Warp& warp, const i32* registers) {
    for (int k = 0; k < COUNT; ++k) {
      const Cell<T>* cells = warp.at<Cell<T>>(registers[k]);
      for (int lane = 0; lane < 32; ++lane) values[lane][k] = T(cells[lane]);
    }
  }
};

// What loads, stores and atomics need of a memory; parameters are only loaded.
template <class Memory> Memory& memory_of(Warp& warp) {
  if constexpr (std::is_same_v<Memory, SharedMemory>) return warp.machine.shared;
  if constexpr (std::is_same_v<Memory, GlobalMemory>) return warp.machine.global;
  if constexpr (std::is_same_v<Memory, Parameters>) return warp.machine.parameters;
}

template <class Memory, class T, int COUNT>
void load(Warp& warp, const Instruction& instruction, u32 lanes) {
  constexpr int size = sizeof(T) * COUNT;
  Memory& memory = memory_of<Memory>(warp);
  typename Memory::Address addresses[32];
  addresses_of(warp, instruction.operands[COUNT], instruction.operands[COUNT + 1], addresses);
  const u32 valid = memory.valid(warp, instruction, addresses, lanes, size);
  Vectors<T, COUNT> vectors;
  if (valid != ALL) std::memset(&vectors, 0xff, sizeof vectors);
  for_each_lane(valid, [&](int lane) {
    if (warp.machine.schedule.checks)
      memory.check_read({warp, instruction, u8(lane), addresses[lane], size});
    std::memcpy(vectors.values[lane], memory.at(addresses[lane]), size);
  });
  vectors.to_registers(warp, instruction.operands, lanes);
}

template <class Memory, class T, int COUNT>
void store(Warp& warp, const Instruction& instruction, u32 lanes) {
  constexpr int size = sizeof(T) * COUNT;
  Memory& memory = memory_of<Memory>(warp);
  typename Memory::Address addresses[32];
  addresses_of(warp, instruction.operands[0], instruction.operands[1], addresses);
  Vectors<T, COUNT> vectors;
  vectors.from_registers(warp, instruction.operands + 2);
  for_each_lane(memory.valid(warp, instruction, addresses, lanes, size), [&](int lane) {
    if (warp.machine.schedule.checks)
      memory.check_write(
          {warp, instruction, u8(lane), addresses[lane], size, Access::plain, vectors.bytes(lane)});
    std::memcpy(memory.at(addresses[lane]), vectors.values[lane], size);
  });
}

template <class T, int COUNT> void register_size() {
  const std::string size = std::to_string(8 * sizeof(T)) + "x" + std::to_string(COUNT);
  Register("ld.global." + size, load<GlobalMemory, T, COUNT>);
  Register("st.global." + size, store<GlobalMemory, T, COUNT>);
  Register("ld.shared." + size, load<SharedMemory, T, COUNT>);
  Register("st.shared." + size, store<SharedMemory, T, COUNT>);
  Register("ld.param." + size, load<Parameters, T, COUNT>);
}

template <class... T> bool register_sizes() {
  (register_size<T, 1>(), ...);
  (register_size<T, 2>(), ...);
  (register_size<T, 4>(), ...);
  return true;
}
const bool sizes_registered = register_sizes<u8, u16, u32, u64>();

// ---- atomics ------------------------------------------------------------------------------------

// Operands: destination (-1 for red), base address, offset, value. F computes the new value.
template <class Memory, class T, class F>
void atomic(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  Memory& memory = memory_of<Memory>(warp);
  typename Memory::Address addresses[32];
  addresses_of(warp, o[1], o[2], addresses);
  const Cell<T>* values = warp.at<Cell<T>>(o[3]);
  Cell<T> old[32] = {};
  for_each_lane(memory.valid(warp, instruction, addresses, lanes, sizeof(T)), [&](int lane) {
    if (warp.machine.schedule.checks)
      memory.check_write({warp, instruction, u8(lane), addresses[lane], sizeof(T), Access::atomic});
    T before;
    std::memcpy(&before, memory.at(addresses[lane]), sizeof before);
    const T after = F{}(before, from_cell<T>(values[lane]));
    std::memcpy(memory.at(addresses[lane]), &after, sizeof after);
    old[lane] = to_cell<T>(before);
  });
  if (o[0] >= 0) put(warp.registers + o[0], old, lanes);
}

template <class T, class F> void register_atomic(const std::string& name, F) {
  for (const char* kind : {"atom", "red"}) {
    Register(std::string(kind) + ".shared." + name, atomic<SharedMemory, T, F>);
    Register(std::string(kind) + ".global." + name, atomic<GlobalMemory, T, F>);
  }
}

const bool atomics_registered = [] {
  register_atomic<u32>("add.u32", [](u32 a, u32 b) { return a + b; });
  register_atomic<u32>("add.s32", [](u32 a, u32 b) { return a + b; });
  register_atomic<u64>("add.u64", [](u64 a, u64 b) { return a + b; });
  register_atomic<u32>("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  register_atomic<i32>("max.s32", [](i32 a, i32 b) { return std::max(a, b); });
  register_atomic<u32>("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  register_atomic<i32>("min.s32", [](i32 a, i32 b) { return std::min(a, b); });
  register_atomic<u32>("or.b32", [](u32 a, u32 b) { return a | b; });
  register_atomic<u32>("and.b32", [](u32 a, u32 b) { return a & b; });
  register_atomic<u32>("exch.b32", [](u32, u32 b) { return b; });
  return true;
}();

// ---- ldmatrix and stmatrix ----------------------------------------------------------------------

// Lane r of matrix k gives the address of row r; after the load, lane l holds two neighbours of row
// l / 4, or of column l / 4 (trans).
struct Matrices {
  u16 rows[32][8];  // row r of matrix k is rows[8 * k + r]

  u32 pair(int matrix, int lane, bool transposed) const {
    const int row = lane / 4, column = 2 * (lane % 4);
    const auto* m = rows + 8 * matrix;
    return transposed ? m[column][row] | u32(m[column + 1][row]) << 16
                      : m[row][column] | u32(m[row][column + 1]) << 16;
  }

  void set_pair(int matrix, int lane, bool transposed, u32 pair) {
    const int row = lane / 4, column = 2 * (lane % 4);
    auto* m = rows + 8 * matrix;
    (transposed ? m[column][row] : m[row][column]) = u16(pair);
    (transposed ? m[column + 1][row] : m[row][column + 1]) = u16(pair >> 16);
  }
};

template <int COUNT, bool TRANSPOSED>
void ldmatrix(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  u32 addresses[32];
  addresses_of(warp, instruction.operands[COUNT], instruction.operands[COUNT + 1], addresses);
  SharedMemory& memory = warp.machine.shared;
  Matrices matrices;
  const u32 rows = COUNT == 4 ? ALL : (1u << (8 * COUNT % 32)) - 1;
  const u32 valid = memory.valid(warp, instruction, addresses, rows, 16);
  if (valid != rows) std::memset(&matrices, 0xff, sizeof matrices);
  for_each_lane(valid, [&](int lane) {
    if (warp.machine.schedule.checks)
      memory.check_read({warp, instruction, u8(lane), addresses[lane], 16});
    std::memcpy(matrices.rows[lane], memory.at(addresses[lane]), 16);
  });
  for (int k = 0; k < COUNT; ++k) {
    u32 cells[32];
    for (int lane = 0; lane < 32; ++lane) cells[lane] = matrices.pair(k, lane, TRANSPOSED);
    put(warp.registers + instruction.operands[k], cells, lanes);
  }
}

template <int COUNT, bool TRANSPOSED>
void stmatrix(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  u32 addresses[32];
  addresses_of(warp, instruction.operands[0], instruction.operands[1], addresses);
  SharedMemory& memory = warp.machine.shared;
  Matrices matrices;
  for (int k = 0; k < COUNT; ++k)
    for (int lane = 0; lane < 32; ++lane)
      matrices.set_pair(k, lane, TRANSPOSED, warp.at<u32>(instruction.operands[2 + k])[lane]);
  const u32 rows = COUNT == 4 ? ALL : (1u << (8 * COUNT % 32)) - 1;
  for_each_lane(memory.valid(warp, instruction, addresses, rows, 16), [&](int lane) {
    const u8* data = reinterpret_cast<const u8*>(matrices.rows[lane]);
    if (warp.machine.schedule.checks)
      memory.check_write({warp, instruction, u8(lane), addresses[lane], 16, Access::plain, data});
    std::memcpy(memory.at(addresses[lane]), data, 16);
  });
}

const Register matrix_opcodes[] = {
    {"ldmatrix.m8n8.x1.shared.b16", ldmatrix<1, false>},
    {"ldmatrix.m8n8.x1.trans.shared.b16", ldmatrix<1, true>},
    {"ldmatrix.m8n8.x2.shared.b16", ldmatrix<2, false>},
    {"ldmatrix.m8n8.x2.trans.shared.b16", ldmatrix<2, true>},
    {"ldmatrix.m8n8.x4.shared.b16", ldmatrix<4, false>},
    {"ldmatrix.m8n8.x4.trans.shared.b16", ldmatrix<4, true>},
    {"stmatrix.m8n8.x1.shared.b16", stmatrix<1, false>},
    {"stmatrix.m8n8.x1.trans.shared.b16", stmatrix<1, true>},
    {"stmatrix.m8n8.x2.shared.b16", stmatrix<2, false>},
    {"stmatrix.m8n8.x2.trans.shared.b16", stmatrix<2, true>},
    {"stmatrix.m8n8.x4.shared.b16", stmatrix<4, false>},
    {"stmatrix.m8n8.x4.trans.shared.b16", stmatrix<4, true>},
};

// ---- cp.async -----------------------------------------------------------------------------------

// The copies arrive in shared memory: at once or at the wait, see Schedule.
void arrive(Warp& warp, const Copy& copy) {
  for_each_lane(copy.lanes, [&](int lane) {
    std::memcpy(warp.machine.shared.at(copy.to[lane]), copy.data[lane].data(), copy.size);
  });
}

// Operands: shared address, offset, global address, offset, bytes to copy (-1: all); the rest
// becomes zero.
template <int SIZE> void cp_async(Warp& warp, const Instruction& instruction, u32 lanes) {
  Machine& machine = warp.machine;
  Copy copy{&instruction, lanes, {}, {}, SIZE};
  u64 from[32];
  addresses_of(warp, instruction.operands[0], instruction.operands[1], copy.to.data());
  addresses_of(warp, instruction.operands[2], instruction.operands[3], from);
  u32 bytes[32], fetching = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bytes[lane] = instruction.operands[4] < 0
                      ? SIZE
                      : std::min<u32>(SIZE, warp.at<u32>(instruction.operands[4])[lane]);
    fetching |= u32(bytes[lane] > 0) << lane;
  }
  for_each_lane(machine.global.valid(warp, instruction, from, lanes & fetching, SIZE),
                [&](int lane) {
                  if (machine.schedule.checks)
                    machine.global.check_read({warp, instruction, u8(lane), from[lane], SIZE});
                  std::memcpy(copy.data[lane].data(), machine.global.at(from[lane]), bytes[lane]);
                });
  copy.lanes = machine.shared.valid(warp, instruction, copy.to.data(), lanes, SIZE);
  if (machine.schedule.checks)
    for_each_lane(copy.lanes, [&](int lane) {
      machine.shared.check_write({warp, instruction, u8(lane), copy.to[lane], SIZE});
      machine.shared.begin_copy(copy.to[lane], SIZE, 1);
    });
  if (!machine.schedule.late_copies)
    arrive(warp, copy);
  else  // whoever reads now finds NaN
    for_each_lane(copy.lanes,
                  [&](int lane) { std::memset(machine.shared.at(copy.to[lane]), 0xff, SIZE); });
  warp.open_copies.push_back(std::move(copy));
}

// Groups are counted for a whole warp, so lanes that a branch divided cannot have different ones.
void commit(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, warp.alive());
  warp.copies.push_back(std::move(warp.open_copies));
  warp.open_copies.clear();
}

void finish(Warp& warp, const std::vector<Copy>& copies) {
  Machine& machine = warp.machine;
  for (const Copy& copy : copies) {
    if (machine.schedule.checks)
      for_each_lane(copy.lanes, [&](int lane) {
        machine.shared.begin_copy(copy.to[lane], copy.size, -1);
        machine.shared.check_write({warp, *copy.instruction, u8(lane), copy.to[lane], copy.size});
      });
    if (machine.schedule.late_copies) arrive(warp, copy);
  }
}

// Operand: how many groups may remain unfinished.
void wait_group(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, warp.alive());
  for (; int(warp.copies.size()) > instruction.operands[0]; warp.copies.pop_front())
    finish(warp, warp.copies.front());
}

void wait_all(Warp& warp, const Instruction& instruction, u32 lanes) {
  commit(warp, instruction, lanes);
  for (; !warp.copies.empty(); warp.copies.pop_front()) finish(warp, warp.copies.front());
}

const Register copy_opcodes[] = {
    {"cp.async.4", cp_async<4>},         {"cp.async.8", cp_async<8>},
    {"cp.async.16", cp_async<16>},       {"cp.async.commit_group", commit},
    {"cp.async.wait_group", wait_group}, {"cp.async.wait_all", wait_all},
};

}  // namespace
}  // namespace ptx
