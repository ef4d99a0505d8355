// Simulates one multiprocessor of a GPU that runs the traced blocks, at given rates.
//
// Each warp issues its instructions in order, each as soon as its operands are ready, one of the
// four schedulers is free and the pipe of the instruction is. Copies and wgmmas run beside the warp
// until it waits for them; barriers hold warps until the others arrive. Every unit works at its
// full rate and serves requests in the order of their times, so what the model leaves out (bank
// conflicts of registers, replays, the order of ptxas) makes a GPU slower, not faster.
#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <queue>
#include <unordered_map>
#include <utility>
#include <vector>

#include "trace.h"

namespace ptx {
namespace {

constexpr int SCHEDULERS = 4;
// Cycles of work that shared memory and the port to L2 accept ahead: some instructions, and what
// covers the latency of DRAM.
constexpr int SHARED_QUEUE = 64, PORT_QUEUE = 1024;

// In the order of trace.py's UNITS.
enum Unit : i32 {
  FREE,  // no instruction of the GPU: its result is ready when its operands are
  FMA,
  ALU,
  MUFU,
  DOUBLE,
  TENSOR,  // mma.sync
  NUM_PIPES,
  INTEGER = NUM_PIPES,  // FMA or ALU, whichever is free first
  SHARED,
  LOAD,
  STORE,
  COPY,
  COMMIT_COPIES,
  WAIT_COPIES,
  WGMMA,
  COMMIT_WGMMA,
  WAIT_WGMMA,
  BARRIER,
  MBARRIER,  // an arrival
  WAIT_MBARRIER,
  BULK_LOAD,
  BULK_STORE,
  COMMIT_BULK,
  WAIT_BULK,
};

// What an instruction costs, in cycles.
struct Cost {
  i32 unit;
  f32 issue;               // of its scheduler
  f32 busy;                // of its pipe
  f32 latency;             // until its result is ready
  f32 shared;              // of shared memory, beside the wavefronts in the trace
  i32 remaining;           // groups that may remain unfinished after a wait
  i32 reads, writes, end;  // its registers in Model::registers: reads.. and writes..end
};

// In the order of trace.py's _Model.
struct Model {
  const Cost* costs;
  const i32* registers;
  i32 num_registers;
  f32 sector_shared, sector_port, sector_l2, sector_dram;  // cycles of a sector in each unit
  f32 latency_l2, latency_dram;
  f32 block_start;
  f64* spent;  // of each instruction: cycles from the previous one of its warp, over all warps
};

// In the order of trace.py's _Played.
struct Played {
  f64 cycles;
  f64 first_matrix, after_matrix;  // mean of a block: until its first and from its last product
  f64 barrier;                     // mean of a warp of a block: waiting at barriers
};

struct Groups {
  std::deque<f64> done;
  f64 open = 0, last = 0;

  void commit() {
    last = std::max(last, open);
    done.push_back(last);
  }
  f64 wait(int remaining) {
    f64 time = 0;
    for (; int(done.size()) > remaining; done.pop_front()) time = done.front();
    return time;
  }
};

struct Slot;

struct PlayedWarp {
  Slot* slot;
  int scheduler;
  const std::vector<Step>* steps = nullptr;
  std::size_t at = 0;
  f64 time = 0, waited = 0;
  std::vector<f32> ready{};  // relative to the start of the block
  Groups copies{}, products{}, bulk{};
};

struct Waiting {
  std::vector<PlayedWarp*> warps;
  int arrived = 0;
};

// A phase of an mbarrier.
struct Phase {
  int parts = 0;  // arrivals and copies that are missing
  f64 time = 0;   // of the last part
  std::vector<PlayedWarp*> warps{};
};

// A block that is on the multiprocessor.
struct Slot {
  f64 start = 0, end = 0, first_matrix = 0, last_matrix = 0;
  int alive = 0;
  std::vector<PlayedWarp> warps{};
  std::array<Waiting, 16> barriers{};
  std::unordered_map<u32, Phase> phases{};
};

class Player {
 public:
  Player(const Model& model, const Trace& trace, int resident, int blocks)
      : model_(model), trace_(trace), left_(blocks), slots_(std::min(resident, blocks)) {
    const int num_warps = int(trace.blocks[0].size());
    int scheduler = 0;
    for (Slot& slot : slots_)
      for (int w = 0; w < num_warps; ++w) slot.warps.push_back({&slot, scheduler++ % SCHEDULERS});
  }

  Played run() {
    for (Slot& slot : slots_) begin(slot, 0);
    while (!events_.empty()) {
      const auto [time, warp] = events_.top();
      events_.pop();
      issue(*warp, time);
    }
    const int blocks = std::max(1, ended_);
    sums_.first_matrix /= blocks;
    sums_.after_matrix /= blocks;
    sums_.barrier /= f64(blocks) * f64(slots_[0].warps.size());
    return sums_;
  }

 private:
  struct Event {
    f64 time;
    PlayedWarp* warp;
    bool operator<(const Event& other) const { return time > other.time; }  // the earliest first
  };

  void begin(Slot& slot, f64 time) {
    if (left_-- <= 0) return;
    const auto& block = trace_.blocks[next_++ % trace_.blocks.size()];
    slot.start = slot.end = time + model_.block_start;
    slot.first_matrix = -1;
    slot.last_matrix = 0;
    slot.alive = int(block.size());
    for (std::size_t w = 0; w < block.size(); ++w) {
      PlayedWarp& warp = slot.warps[w];
      warp.steps = &block[w];
      warp.at = 0;
      warp.time = slot.start;
      warp.waited = 0;
      warp.ready.assign(model_.num_registers, 0);
      warp.copies = warp.products = warp.bulk = {};
    }
    count_parts(slot);
    for (PlayedWarp& warp : slot.warps) schedule(warp);
  }

  void count_parts(Slot& slot) {
    slot.phases.clear();
    for (const PlayedWarp& warp : slot.warps)
      for (const Step& step : *warp.steps) {
        const i32 unit = model_.costs[step.pc].unit;
        slot.phases[step.phase].parts += unit == MBARRIER || unit == BULK_LOAD;
      }
  }

  // Put the warp's next instruction among the events, or end the warp.
  void schedule(PlayedWarp& warp) {
    while (warp.at < warp.steps->size()) {
      const Cost& cost = model_.costs[(*warp.steps)[warp.at].pc];
      f64 time = warp.slot->start + ready(warp, cost);
      if (cost.unit != FREE) {
        events_.push({std::max(warp.time, time), &warp});
        return;
      }
      write(warp, cost, time);
      ++warp.at;
    }
    finish(warp);
  }

  f32 ready(const PlayedWarp& warp, const Cost& cost) const {
    f32 time = 0;
    for (int k = cost.reads; k < cost.writes; ++k)
      time = std::max(time, warp.ready[model_.registers[k]]);
    return time;
  }

  void write(PlayedWarp& warp, const Cost& cost, f64 time) {
    for (int k = cost.writes; k < cost.end; ++k)
      warp.ready[model_.registers[k]] = f32(time - warp.slot->start);
    warp.slot->end = std::max(warp.slot->end, time);
  }

  void finish(PlayedWarp& warp) {
    Slot& slot = *warp.slot;
    slot.end = std::max(slot.end, warp.time);
    sums_.barrier += warp.waited;
    --slot.alive;
    for (Waiting& barrier : slot.barriers) release(barrier, slot.alive, slot.end);
    if (slot.alive > 0) return;
    ++ended_;
    sums_.cycles = std::max(sums_.cycles, slot.end);
    if (slot.first_matrix >= 0) {
      sums_.first_matrix += slot.first_matrix - slot.start;
      sums_.after_matrix += slot.end - slot.last_matrix;
    }
    begin(slot, slot.end);
  }

  void issue(PlayedWarp& warp, f64 time) {
    const Step& step = (*warp.steps)[warp.at];
    const Cost& cost = model_.costs[step.pc];
    f64& scheduler = schedulers_[warp.scheduler];
    time = std::max(time, scheduler);
    const int pipe = pipe_of(warp, cost);
    const f64 free = free_from(warp, step, cost, pipe);
    if (free > time) return events_.push({free, &warp});  // other warps may issue until then
    const f64 next = time + cost.issue;
    model_.spent[step.pc] += next - warp.time;
    scheduler = warp.time = next;
    ++warp.at;
    if (pipe < NUM_PIPES)
      compute(warp, cost, pipe, time);
    else
      run(warp, step, cost, time);
  }

  // When the unit of an instruction can take it.
  f64 free_from(const PlayedWarp& warp, const Step& step, const Cost& cost, int pipe) const {
    if (pipe < NUM_PIPES) return pipes_[warp.scheduler][pipe];
    if (cost.unit == BULK_LOAD || cost.unit == BULK_STORE) return 0;  // these have their own engine
    f64 time = 0;
    if (step.wavefronts + step.sectors > 0) time = shared_ - SHARED_QUEUE;
    if (step.sectors > 0) time = std::max(time, port_ - PORT_QUEUE);
    return time;
  }

  int pipe_of(const PlayedWarp& warp, const Cost& cost) const {
    if (cost.unit != INTEGER) return cost.unit;
    const auto& pipes = pipes_[warp.scheduler];
    return pipes[FMA] < pipes[ALU] ? FMA : ALU;
  }

  void compute(PlayedWarp& warp, const Cost& cost, int pipe, f64 time) {
    pipes_[warp.scheduler][pipe] = time + cost.busy;
    const f64 done = time + std::max(cost.busy, cost.latency);
    write(warp, cost, done);
    if (pipe == TENSOR) note_product(*warp.slot, time, done);
    schedule(warp);
  }

  void run(PlayedWarp& warp, const Step& step, const Cost& cost, f64 time) {
    switch (cost.unit) {
      case SHARED:
        shared_ = std::max(shared_, time) + std::max<f64>(cost.busy, step.wavefronts);
        write(warp, cost, shared_ + cost.latency);
        break;
      case LOAD:
      case STORE:
      case COPY: {
        const f64 done = memory(step, time);
        if (cost.unit == COPY) warp.copies.open = std::max(warp.copies.open, done);
        if (cost.unit == LOAD) write(warp, cost, done + cost.latency);
        // A block does not wait for its stores, but the launch does.
        if (cost.unit == STORE) sums_.cycles = std::max(sums_.cycles, done);
        break;
      }
      case COMMIT_COPIES:
        warp.copies.commit();
        break;
      case WAIT_COPIES:
        wait(warp, warp.copies.wait(cost.remaining));
        break;
      case WGMMA:
        product(warp, cost, time);
        break;
      case COMMIT_WGMMA:
        warp.products.commit();
        break;
      case WAIT_WGMMA:
        wait(warp, warp.products.wait(cost.remaining));
        write(warp, cost, warp.time);
        break;
      case BARRIER:
        return arrive(warp, step, cost, time);
      case MBARRIER:
        complete_part(warp, step, time + cost.latency);
        break;
      case WAIT_MBARRIER:
        if (waits_for_phase(warp, step, cost)) return;
        break;
      case BULK_LOAD:
        complete_part(warp, step, memory(step, time));
        break;
      case BULK_STORE:
        warp.bulk.open = std::max(warp.bulk.open, memory(step, time));
        break;
      case COMMIT_BULK:
        warp.bulk.commit();
        break;
      case WAIT_BULK:
        wait(warp, warp.bulk.wait(cost.remaining));
        break;
    }
    schedule(warp);
  }

  void complete_part(PlayedWarp& warp, const Step& step, f64 time) {
    Phase& phase = warp.slot->phases[step.phase];
    phase.time = std::max(phase.time, time);
    if (--phase.parts > 0 || step.phase == 0) return;
    for (PlayedWarp* waiting : std::exchange(phase.warps, {})) {
      wait(*waiting, phase.time);
      schedule(*waiting);
    }
  }

  // Whether the warp waits for a phase of an mbarrier that is not complete.
  bool waits_for_phase(PlayedWarp& warp, const Step& step, const Cost& cost) {
    if (step.phase == 0) return false;
    Phase& phase = warp.slot->phases[step.phase];
    if (phase.parts > 0) {
      phase.warps.push_back(&warp);
      return true;
    }
    wait(warp, phase.time + cost.latency);
    return false;
  }

  // The warp waits at the instruction that it has just issued.
  void wait(PlayedWarp& warp, f64 time) {
    if (time <= warp.time) return;
    model_.spent[(*warp.steps)[warp.at - 1].pc] += time - warp.time;
    warp.time = time;
  }

  // Sectors pass the first level cache and the multiprocessor's port to L2; the fresh ones come
  // from DRAM. L2 and DRAM serve all multiprocessors: on average each gets its share of their
  // rates, but while the others ask for nothing, one gets more.
  f64 memory(const Step& step, f64 time) {
    shared_ = std::max(shared_, time) +
              std::max<f64>(step.wavefronts, step.sectors * model_.sector_shared);
    port_ = std::max(port_, time) + step.sectors * model_.sector_port;
    l2_ += step.sectors * model_.sector_l2;
    dram_ += step.fresh * model_.sector_dram;
    const f64 done = std::max(port_, l2_);
    return step.fresh > 0 ? std::max(done, dram_) + model_.latency_dram : done + model_.latency_l2;
  }

  // Each of the four warps of a wgmma uses the tensor core of its scheduler.
  void product(PlayedWarp& warp, const Cost& cost, f64 time) {
    f64& tensor = pipes_[warp.scheduler][TENSOR];
    tensor = std::max(tensor, time) + cost.busy;
    shared_ = std::max(shared_, time) + cost.shared;
    const f64 done = std::max(tensor, shared_) + cost.latency;
    warp.products.open = std::max(warp.products.open, done);
    note_product(*warp.slot, time, done);
  }

  void note_product(Slot& slot, f64 start, f64 end) {
    if (slot.first_matrix < 0) slot.first_matrix = start;
    slot.last_matrix = std::max(slot.last_matrix, end);
  }

  void arrive(PlayedWarp& warp, const Step& step, const Cost& cost, f64 time) {
    Waiting& barrier = warp.slot->barriers[step.barrier % 16];
    const bool waits = cost.remaining == 0;  // bar.sync, not bar.arrive
    ++barrier.arrived;
    if (waits) {
      warp.time = time + cost.latency;
      barrier.warps.push_back(&warp);
    }
    const int expected = step.barrier / 16;
    release(barrier, expected ? expected : warp.slot->alive, time + cost.latency);
    if (!waits) schedule(warp);
  }

  void release(Waiting& barrier, int expected, f64 time) {
    if (barrier.arrived == 0 || barrier.arrived < expected) return;
    const std::vector<PlayedWarp*> warps = std::move(barrier.warps);
    barrier = {};
    for (PlayedWarp* warp : warps) {
      warp->waited += std::max(0.0, time - warp->time);
      wait(*warp, time);
    }
    for (PlayedWarp* warp : warps) schedule(*warp);
  }

  const Model& model_;
  const Trace& trace_;
  int left_, next_ = 0, ended_ = 0;
  std::vector<Slot> slots_;
  std::priority_queue<Event> events_;
  std::array<f64, SCHEDULERS> schedulers_{};
  std::array<std::array<f64, NUM_PIPES>, SCHEDULERS> pipes_{};
  f64 shared_ = 0, port_ = 0, l2_ = 0, dram_ = 0;
  Played sums_{};
};

}  // namespace
}  // namespace ptx

extern "C" {

// Play `blocks` blocks, of which `resident` run at a time; the traced blocks are repeated.
ptx::Played ptx_play(const void* trace, const ptx::Model* model, int resident, int blocks) {
  return ptx::Player(*model, *static_cast<const ptx::Trace*>(trace), resident, blocks).run();
}

}  // extern "C"
