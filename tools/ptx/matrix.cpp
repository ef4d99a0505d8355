// mma.sync and wgmma. Products are exact in float32 and summed in order of k; GPUs round otherwise.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

constexpr int K = 16;  // of every matrix instruction on 16-bit operands

// Lane l holds two neighbours of row l / 4 in each register.
template <class T> void a_fragment(const std::array<const u32*, 4>& registers, f32 (*a)[K]) {
  for (int k = 0; k < 4; ++k)
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4 + 8 * (k & 1), column = 2 * (lane % 4) + 8 * (k >> 1);
      const u32 pair = registers[k][lane];
      a[row][column] = widen(T{u16(pair)});
      a[row][column + 1] = widen(T{u16(pair >> 16)});
    }
}

// Row and column of register k of lane l in an accumulator of 16 rows.
int row_of(int lane, int k) { return lane / 4 + 8 * (k >> 1 & 1); }
int column_of(int lane, int k) { return 8 * (k / 4) + 2 * (lane % 4) + (k & 1); }

// c += a @ b for 16 rows and N columns (a multiple of 8).
template <int STRIDE>
void multiply(const f32 (*a)[K], const f32 (*b)[STRIDE], f32 (*c)[STRIDE], int columns) {
  for (int n = 0; n < columns; n += 8)
    for (int m = 0; m < 16; m += 4) {
      f32 sums[4][8] = {};
      for (int k = 0; k < K; ++k)
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 8; ++j)
            sums[i][j] = __builtin_fmaf(a[m + i][k], b[k][n + j], sums[i][j]);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 8; ++j) c[m + i][n + j] += sums[i][j];
    }
}

template <int STRIDE>
void read_accumulator(const Warp& warp, const i32* registers, int count, f32 (*c)[STRIDE]) {
  for (int k = 0; k < count; ++k) {
    const f32* cells = warp.at<f32>(registers[k]);
    for (int lane = 0; lane < 32; ++lane) c[row_of(lane, k)][column_of(lane, k)] = cells[lane];
  }
}

template <int STRIDE>
void write_accumulator(Warp& warp, const i32* registers, int count, const f32 (*c)[STRIDE]) {
  for (int k = 0; k < count; ++k) {
    u32* cells = warp.at<u32>(registers[k]);
    for (int lane = 0; lane < 32; ++lane)
      cells[lane] = canonical(std::bit_cast<u32>(c[row_of(lane, k)][column_of(lane, k)]));
  }
}

// Operands: 4 registers of D, 4 of A, 2 of B, 4 of C.
template <class T> void mma(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  if (warp.machine.trace != nullptr) return;  // which needs no values
  const i32* o = instruction.operands;
  f32 a[16][K], b[K][8], c[16][8];
  a_fragment<T>({warp.at<u32>(o[4]), warp.at<u32>(o[5]), warp.at<u32>(o[6]), warp.at<u32>(o[7])},
                a);
  for (int k = 0; k < 2; ++k) {
    const u32* pairs = warp.at<u32>(o[8 + k]);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = 2 * (lane % 4) + 8 * k;
      b[row][lane / 4] = widen(T{u16(pairs[lane])});
      b[row + 1][lane / 4] = widen(T{u16(pairs[lane] >> 16)});
    }
  }
  read_accumulator(warp, o + 10, 4, c);
  multiply(a, b, c, 8);
  write_accumulator(warp, o, 4, c);
}

const Register mma_opcodes[] = {
    {"mma.m16n8k16.row.col.f32.bf16.bf16.f32", mma<bf16>},
    {"mma.m16n8k16.row.col.f32.f16.f16.f32", mma<f16>},
};

// ---- wgmma --------------------------------------------------------------------------------------

// A matrix in shared memory, as rows of 16 bytes (PTX ISA, "Matrix descriptor" and "Canonical
// layouts").
class Descriptor {
 public:
  explicit Descriptor(u64 bits)
      : start_(bits << 4 & 0x3fff0), leading_(bits >> 12 & 0x3fff0), stride_(bits >> 28 & 0x3fff0) {
    constexpr int widths[] = {16, 128, 64, 32};  // of the swizzle, in bytes
    width_ = widths[bits >> 62];
  }

  // Eight elements of row r along k, from k = 8 * part.
  u32 k_major(int r, int part) const {
    const u32 row = start_ + r / 8 * stride_ + r % 8 * width_;
    return width_ == 16 ? row + part * leading_ : swizzle(row + 16 * part);
  }

  // Eight elements along m or n, from 8 * part, at k.
  u32 mn_major(int part, int k) const {
    if (width_ == 16) return start_ + part * stride_ + k % 8 * 16 + k / 8 * leading_;
    const int parts = width_ / 16;
    return swizzle(start_ + part / parts * leading_ + part % parts * 16 + k % 8 * width_ +
                   k / 8 * stride_);
  }

 private:
  u32 swizzle(u32 address) const { return address ^ (address >> 7 & (width_ / 16 - 1)) << 4; }

  u32 start_, leading_, stride_, width_;
};

// How a wgmma finds its operands. Operands of the instruction: registers of D, then A (4 registers
// or a descriptor), the descriptor of B, the predicate "accumulate", then four integers: columns,
// whether A is in registers, and whether A and B are transposed.
struct Form {
  int columns;
  bool a_in_registers, a_transposed, b_transposed;
  const i32* a;
  i32 b, accumulates;

  explicit Form(const Instruction& instruction) {
    const i32* last = instruction.operands + instruction.count - 4;
    columns = last[0];
    a_in_registers = last[1];
    a_transposed = last[2];
    b_transposed = last[3];
    a = instruction.operands + columns / 2;
    b = a[a_in_registers ? 4 : 1];
    accumulates = a[a_in_registers ? 5 : 2];
  }

  // Call f(address, matrix row, first element of the other index, whether elements run along k) for
  // each 16 bytes that this warp reads.
  template <class F> void for_a(const Warp& warp, u64 bits, F f) const {
    if (a_in_registers) return;
    const Descriptor descriptor(bits);
    const int first = 16 * (warp.id % 4);
    if (a_transposed)
      for (int part = 0; part < 2; ++part)
        for (int k = 0; k < K; ++k) f(descriptor.mn_major(first / 8 + part, k), 8 * part, k);
    else
      for (int row = 0; row < 16; ++row)
        for (int part = 0; part < 2; ++part)
          f(descriptor.k_major(first + row, part), row, 8 * part);
  }

  template <class F> void for_b(u64 bits, F f) const {
    const Descriptor descriptor(bits);
    if (b_transposed)
      for (int part = 0; part < columns / 8; ++part)
        for (int k = 0; k < K; ++k) f(descriptor.mn_major(part, k), k, 8 * part);
    else
      for (int column = 0; column < columns; ++column)
        for (int part = 0; part < 2; ++part) f(descriptor.k_major(column, part), 8 * part, column);
  }
};

// Write eight 16-bit elements to out[0], out[step], ...
template <class T> void widen_chunk(const Warp& warp, u32 address, f32* out, int step) {
  u16 values[8];
  std::memset(values, 0xff, sizeof values);
  if (warp.machine.shared.all_valid(&address, 1, 16))
    std::memcpy(values, warp.machine.shared.at(address), 16);
  for (int k = 0; k < 8; ++k) out[k * step] = widen(T{values[k]});
}

template <class T> void compute(Warp& warp, const Delayed& wgmma) {
  if (warp.machine.trace != nullptr) return;  // which needs no values
  const Form form(*wgmma.instruction);
  constexpr int STRIDE = 256;
  static thread_local f32 a[16][K], b[K][STRIDE], c[16][STRIDE];
  if (form.a_in_registers)
    a_fragment<T>({wgmma.a[0].data(), wgmma.a[1].data(), wgmma.a[2].data(), wgmma.a[3].data()}, a);
  form.for_a(warp, wgmma.a_descriptor, [&](u32 address, int row, int k) {
    widen_chunk<T>(warp, address, &a[row][k], form.a_transposed ? K : 1);
  });
  form.for_b(wgmma.b_descriptor, [&](u32 address, int k, int column) {
    widen_chunk<T>(warp, address, &b[k][column], form.b_transposed ? 1 : STRIDE);
  });
  const i32* registers = wgmma.instruction->operands;
  if (wgmma.accumulates)
    read_accumulator(warp, registers, form.columns / 2, c);
  else
    for (auto& row : c) std::fill_n(row, form.columns, 0.0f);
  multiply(a, b, c, form.columns);
  write_accumulator(warp, registers, form.columns / 2, c);
}

void check_reads(Warp& warp, const Delayed& wgmma) {
  SharedMemory& shared = warp.machine.shared;
  const Instruction& instruction = *wgmma.instruction;
  const auto visit = [&](u32 address, int, int) {
    if (shared.valid(warp, instruction, &address, 1, 16) == 0) return;
    shared.check_read({warp, instruction, NO_LANE, address, 16, Access::wgmma});
  };
  const Form form(instruction);
  form.for_a(warp, wgmma.a_descriptor, visit);
  form.for_b(wgmma.b_descriptor, visit);
}

u64 uniform(Warp& warp, const Instruction& instruction, i32 operand) {
  const u64* values = warp.at<u64>(operand);
  for (int lane = 1; lane < 32; ++lane)
    if (values[lane] != values[0])
      warp.machine.faults.add(Kind::descriptor, warp, instruction, lane, values[lane], 0);
  return values[0];
}

template <class T> void wgmma(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  const Form form(instruction);
  Delayed wgmma{&instruction, warp.wgmma_commits + 1, compute<T>};
  if (form.a_in_registers)
    for (int k = 0; k < 4; ++k) std::memcpy(wgmma.a[k].data(), warp.registers + form.a[k], 128);
  else
    wgmma.a_descriptor = uniform(warp, instruction, form.a[0]);
  wgmma.b_descriptor = uniform(warp, instruction, form.b);
  wgmma.accumulates = *warp.at<u32>(form.accumulates) & 1;
  if (warp.machine.schedule.checks) check_reads(warp, wgmma);
  if (!warp.machine.schedule.late_wgmma) {
    compute<T>(warp, wgmma);
    wgmma.complete = nullptr;
  }
  warp.delayed.push_back(wgmma);
}

const std::vector<Register> wgmma_opcodes = [] {
  std::vector<Register> all;
  for (int columns = 8; columns <= 256; columns += 8) {
    const std::string shape = "wgmma.mma_async.m64n" + std::to_string(columns) + "k16.f32.";
    all.emplace_back(shape + "bf16.bf16", wgmma<bf16>);
    all.emplace_back(shape + "f16.f16", wgmma<f16>);
  }
  return all;
}();

void commit(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  ++warp.wgmma_commits;
  ++warp.machine.progress;
}

void move(Warp& warp, const Delayed& delayed) {
  const i32* o = delayed.instruction->operands;
  const u32* cells = delayed.value_known ? delayed.a[0].data() : warp.at<u32>(o[1]);
  std::memcpy(warp.registers + o[0], cells, sizeof delayed.a[0]);
}

// The group of the last delayed instruction that will write a register, or 0.
int writer_of(const Warp& warp, i32 operand) {
  for (auto delayed = warp.delayed.rbegin(); delayed != warp.delayed.rend(); ++delayed) {
    if (delayed->complete == nullptr) continue;
    const int outputs = delayed->complete == move ? 1 : Form(*delayed->instruction).columns / 2;
    const i32* registers = delayed->instruction->operands;
    if (std::find(registers, registers + outputs, operand) != registers + outputs)
      return delayed->group;
  }
  return 0;
}

// LLVM copies accumulators between wgmmas that have not been waited for, and ptxas removes these
// copies: a copy of a result that does not exist yet is delayed too.
void move_accumulator(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  const int from = writer_of(warp, o[1]), to = writer_of(warp, o[0]);
  if (from == 0 && to == 0) return put(warp.registers + o[0], warp.at<u32>(o[1]), lanes);
  Delayed delayed{&instruction, std::max(from, to), move};
  delayed.value_known = from == 0;
  if (delayed.value_known)
    std::memcpy(delayed.a[0].data(), warp.registers + o[1], sizeof delayed.a[0]);
  warp.delayed.push_back(delayed);
}

// Complete the groups of one warp up to a number.
void finish(Warp& warp, int last) {
  for (const Delayed& delayed : warp.delayed)
    if (delayed.group <= last && delayed.complete != nullptr) delayed.complete(warp, delayed);
  std::erase_if(warp.delayed, [&](const Delayed& delayed) { return delayed.group <= last; });
}

// Operand: how many groups may remain unfinished. A wgmma belongs to four warps and completes for
// all of them at once, so a warp that waits also waits until the other three have issued theirs.
void wait_group(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  Machine& machine = warp.machine;
  const int last = warp.wgmma_commits - instruction.operands[0];
  const int first = warp.id / 4 * 4, end = std::min(first + 4, machine.num_warps);
  for (int id = first; id < end; ++id)
    if (machine.warps[id].wgmma_commits < last) {
      --warp.pc;
      warp.state = State::blocked;
      return;
    }
  for (int id = first; id < end; ++id) finish(machine.warps[id], last);
  warp.finished[warp.id / 4] = std::max(warp.finished[warp.id / 4], last);
}

const Register group_opcodes[] = {
    {"wgmma.commit_group", commit},
    {"wgmma.wait_group", wait_group},
    {"wgmma.move", move_accumulator},
};

}  // namespace
}  // namespace ptx
