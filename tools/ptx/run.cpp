// The table of opcodes, the scheduler of warps, and the C interface for machine.py.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <sstream>

#include "lanes.h"

namespace ptx {

std::map<std::string, Opcode>& opcodes() {
  static std::map<std::string, Opcode> table;
  return table;
}

Register::Register(const std::string& spellings, Function function, const std::string& signature) {
  std::istringstream words(spellings);
  for (std::string spelling; words >> spelling;) opcodes()[spelling] = {function, signature};
}

// In the order of machine.py's SPECIAL.
enum Special {
  TID,
  CTAID_X,
  CTAID_Y,
  CTAID_Z,
  NCTAID_X,
  NCTAID_Y,
  NCTAID_Z,
  NTID,
  LANEID,
  WARPID,
  NUM_SPECIAL
};
constexpr int REGISTER_BYTES = 128;

struct Program {
  std::vector<Instruction> code;
  std::vector<i32> operands;
  int register_bytes;
  int granule_shift;  // log2 of the bytes of the smallest access to memory
};

// In the order of machine.py's Launch.
struct Launch {
  i32 grid[3];
  i32 threads, shared_bytes;
  const u8* parameters;
  i64 parameter_bytes;
  const char* constants;  // the first bytes of each warp's registers, after the special ones
  i64 constant_bytes;
  const u64* memory;  // start and end of each range
  i64 num_ranges;
  Schedule schedule;
};

namespace {

// A cache line.
struct alignas(64) Line {
  char bytes[64];
};

class Runner {
 public:
  Runner(const Program& program, const Launch& launch, Trace* trace = nullptr)
      : program_(program), launch_(launch) {
    machine_.trace = trace;
    machine_.code = program.code.data();
    machine_.schedule = launch.schedule;
    machine_.generator.seed(launch.schedule.seed);
    machine_.num_warps = (launch.threads + 31) / 32;
    std::copy_n(launch.grid, 3, machine_.grid.begin());
    machine_.parameters = {launch.parameters, launch.parameter_bytes};
    machine_.shared.resize(launch.shared_bytes, program.granule_shift, machine_.num_warps,
                           machine_.schedule.checks);
    machine_.global.shift = program.granule_shift;
    for (i64 k = 0; k < launch.num_ranges; ++k)
      machine_.global.add(launch.memory[2 * k], launch.memory[2 * k + 1], machine_.schedule.checks);
    for (const Instruction& instruction : program.code)
      instruction.tensor = std::numeric_limits<int>::max();
    make_warps();
  }

  const Faults& run() {
    std::vector<int> order(machine_.grid[0] * machine_.grid[1] * machine_.grid[2]);
    std::iota(order.begin(), order.end(), 0);
    if (machine_.schedule.seed != 0)
      for (std::size_t k = order.size(); k > 1; --k)
        std::swap(order[k - 1], order[machine_.random(u32(k))]);
    for (int block : order) run_block(block);
    return machine_.faults;
  }

  // Run a sample of the blocks, spread over the grid, until the trace is long enough.
  const Faults& run_sample() {
    const u64 count = u64(machine_.grid[0]) * machine_.grid[1] * machine_.grid[2];
    constexpr double GOLDEN = 0.6180339887498949;
    std::vector<bool> done(count);
    for (u64 k = 0; k < count && !machine_.trace->is_enough(); ++k) {
      u64 block = u64(std::fmod(double(k) * GOLDEN, 1.0) * double(count));
      while (done[block]) block = (block + 1) % count;
      done[block] = true;
      machine_.trace->begin_block(machine_.num_warps);
      run_block(int(block));
    }
    return machine_.faults;
  }

 private:
  void make_warps() {
    const std::size_t lines = (program_.register_bytes + sizeof(Line) - 1) / sizeof(Line);
    registers_.resize(lines * machine_.num_warps);
    std::memset(registers_.data(), 0xff, registers_.size() * sizeof(Line));
    machine_.warps.reserve(machine_.num_warps);
    for (int id = 0; id < machine_.num_warps; ++id) {
      machine_.warps.push_back(Warp{{}, machine_, id, registers_[lines * id].bytes});
      std::memcpy(machine_.warps[id].registers + NUM_SPECIAL * REGISTER_BYTES, launch_.constants,
                  launch_.constant_bytes);
    }
  }

  void run_block(int block) {
    machine_.block = block;
    machine_.shared.begin_block(clock_, machine_.schedule.checks);
    machine_.global.block_start = clock_;
    machine_.barriers.fill({});
    machine_.mbarriers.clear();
    machine_.cluster_barrier = {};
    for (Warp& warp : machine_.warps) begin(warp);
    while (Warp* warp = next_warp()) run_warp(*warp, turn_length());
    machine_.end_block();
    for (const Warp& warp : machine_.warps)
      clock_ = std::max({clock_, warp.clocks[warp.id], warp.store_clock});
  }

  void begin(Warp& warp) {
    warp.state = State::ready;
    warp.pc = 0;
    const int threads = std::min(32, launch_.threads - 32 * warp.id);
    warp.active = threads == 32 ? ALL : (1u << threads) - 1;
    warp.elsewhere.clear();
    warp.merge_place = std::numeric_limits<int>::max();
    static_cast<Knowledge&>(warp) = {};
    warp.clocks.fill(clock_);
    warp.fenced.fill(clock_);
    warp.tick();
    warp.lanes_synced = clock_;
    warp.open_copies.clear();
    warp.copies.clear();
    warp.delayed.clear();
    warp.wgmma_commits = 0;
    warp.stores.clear();
    warp.stores_issued = 0;
    warp.store_clock = clock_;
    warp.bulk_commits.fill(0);
    warp.waiting = {};
    warp.cluster_arrivals = 0;
    warp.register_counts.clear();
    set_special_registers(warp);
  }

  void set_special_registers(Warp& warp) {
    const auto& grid = machine_.grid;
    const int x = machine_.block % grid[0], y = machine_.block / grid[0] % grid[1],
              z = machine_.block / grid[0] / grid[1];
    const int uniform[NUM_SPECIAL] = {0, x,      y, z, grid[0], grid[1], grid[2], launch_.threads,
                                      0, warp.id};
    for (int k = 0; k < NUM_SPECIAL; ++k)
      std::fill_n(warp.at<i32>(k * REGISTER_BYTES), 32, uniform[k]);
    std::iota(warp.at<i32>(TID * REGISTER_BYTES), warp.at<i32>(TID * REGISTER_BYTES) + 32,
              32 * warp.id);
    std::iota(warp.at<i32>(LANEID * REGISTER_BYTES), warp.at<i32>(LANEID * REGISTER_BYTES) + 32, 0);
  }

  // The warp that runs next, or null if all are done or wait for each other.
  Warp* next_warp() {
    Warp* found = choose(State::ready);
    if (found != nullptr) return found;
    // A blocked warp looks again whether it can go on.
    machine_.land_awaited();
    for (Warp& warp : machine_.warps)
      if (warp.state == State::blocked) warp.state = State::ready;
    found = choose(State::ready);
    rounds_ = machine_.progress == progress_ ? rounds_ + 1 : 0;
    progress_ = machine_.progress;
    if (found != nullptr && rounds_ <= MOST_ROUNDS) return found;
    report_waiting();
    return nullptr;
  }

  Warp* choose(State state) {
    int count = 0;
    Warp* found = nullptr;
    for (Warp& warp : machine_.warps) {
      if (warp.state != state) continue;
      ++count;
      // Each of the warps found so far is equally likely.
      if (found == nullptr || (machine_.schedule.seed != 0 && machine_.random(count) == 0))
        found = &warp;
    }
    return found;
  }

  void report_waiting() {
    for (const Warp& warp : machine_.warps) {
      if (warp.state == State::done) continue;
      if (warp.state != State::at_barrier && report_mbarrier(warp)) continue;
      const int pc = std::max(0, warp.pc - (warp.state == State::at_barrier));
      machine_.faults.add(Kind::deadlock, warp, program_.code[pc], 0, 0, 0);
    }
  }

  // How many instructions a warp runs before another may run.
  int turn_length() {
    if (machine_.schedule.seed == 0 || machine_.random(4) == 0)
      return std::numeric_limits<int>::max();
    return 1 + int(machine_.random(64));
  }

  void run_warp(Warp& warp, int turn) {
    const Instruction* const code = program_.code.data();
    while (warp.state == State::ready && turn-- > 0) {
      const Instruction& instruction = code[warp.pc++];
      u32 lanes = warp.active;
      if (instruction.guard >= 0) {
        const u32 guard = *warp.at<u32>(instruction.guard);
        lanes &= instruction.negated ? ~guard : guard;
      }
      if (machine_.trace != nullptr) machine_.trace->begin(warp.id, instruction.pc);
      if (lanes != 0) instruction.function(warp, instruction, lanes);
      if (machine_.trace != nullptr) machine_.trace->end(warp.id, warp.state == State::blocked);
      if (warp.state == State::ready && code[warp.pc].place >= warp.merge_place) warp.settle();
    }
  }

  const Program& program_;
  const Launch& launch_;
  Machine machine_{};
  std::vector<Line> registers_;
  u32 clock_ = 0;  // of the latest synchronisation in earlier blocks
  // In which all warps waited, and nothing happened that could let one go on. A warp that polls
  // does other things in between, so only many such rounds show that it waits forever.
  static constexpr int MOST_ROUNDS = 1000;
  int rounds_ = 0;
  u64 progress_ = 0;
};

}  // namespace
}  // namespace ptx

extern "C" {

// "name:signature" of each opcode, one on each line.
const char* ptx_opcodes() {
  static const std::string all = [] {
    std::string lines;
    for (const auto& [name, opcode] : ptx::opcodes()) lines += name + ":" + opcode.signature + "\n";
    return lines;
  }();
  return all.c_str();
}

// names: opcodes separated by spaces; order: the place of each instruction, see order.py; guards:
// byte offsets, -1 if none, negated ones as -2 - offset; starts: of each instruction's operands, and
// their total.
void* ptx_program(const char* names, int count, const ptx::i32* order, const ptx::i32* guards,
                  const ptx::i32* starts, const ptx::i32* operands, int register_bytes,
                  int granule_shift) {
  auto program = std::make_unique<ptx::Program>();
  program->operands.assign(operands, operands + starts[count]);
  program->register_bytes = register_bytes;
  program->granule_shift = granule_shift;
  for (int pc = 0; pc < count; ++pc) {
    const std::size_t length = std::strcspn(names, " ");
    const bool negated = guards[pc] < -1;
    program->code.push_back({ptx::opcodes().at(std::string(names, length)).function,
                             negated ? -2 - guards[pc] : guards[pc], negated, pc, order[pc],
                             program->operands.data() + starts[pc], starts[pc + 1] - starts[pc],
                             0});
    names += length + 1;
  }
  return program.release();
}

void ptx_free(void* program) { delete static_cast<ptx::Program*>(program); }

// Returns the number of faults, of which the first `capacity` are written; -1: more
// synchronisations than the checks can count; -2: not enough memory.
int ptx_run(const void* program, const ptx::Launch* launch, ptx::Fault* faults, int capacity) try {
  ptx::Runner runner(*static_cast<const ptx::Program*>(program), *launch);
  const auto& found = runner.run().list;
  std::copy_n(found.begin(), std::min<std::size_t>(found.size(), capacity), faults);
  return int(found.size());
} catch (const ptx::ClockOverflow&) {
  return -1;
} catch (const std::bad_alloc&) {
  return -2;
}

// Run a sample of the blocks and return their trace, or null if there is not enough memory. writes:
// whether each instruction writes global memory; fault: the first fault, if there is one.
void* ptx_trace(const void* handle, const ptx::Launch* launch, const ptx::u8* writes,
                ptx::u64 enough, ptx::Fault* fault, int* has_fault) try {
  const auto& program = *static_cast<const ptx::Program*>(handle);
  auto trace =
      std::make_unique<ptx::Trace>(std::vector<bool>(writes, writes + program.code.size()), enough);
  for (ptx::i64 k = 0; k < launch->num_ranges; ++k)
    trace->add_range(launch->memory[2 * k], launch->memory[2 * k + 1]);
  ptx::Runner runner(program, *launch, trace.get());
  const auto& found = runner.run_sample().list;
  *has_fault = !found.empty();
  if (*has_fault) *fault = found.front();
  return trace.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // extern "C"
