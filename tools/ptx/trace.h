// A trace of some blocks of a launch: which instructions each warp ran, and what they asked of the
// memories. timeline.cpp simulates them at the rates of a GPU.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "types.h"

namespace ptx {

constexpr u32 SECTOR = 32;  // bytes that global memory is read and written in
// Blocks may differ, so that some are needed; but long ones take memory.
constexpr std::size_t LEAST_BLOCKS = 16, MOST_STEPS = 8'000'000;

// An instruction that a warp has run.
struct Step {
  u32 pc;
  u16 wavefronts;  // of shared memory, one a cycle
  u16 conflicts;   // those among them that other banks would have saved
  u16 sectors;     // of global memory
  u16 fresh;       // those among them that no block has touched before
  u16 barrier;     // number of the barrier, and 16 * the warps that it expects (0: all)
  u32 phase;       // of an mbarrier, that this completes a part of or waits for; 0: none
};

// The sectors of a range of global memory.
class Sectors {
 public:
  Sectors(u64 start, u64 end);
  // Touch a sector, and return whether it is the first time in this launch.
  bool touch(u64 sector, bool writes, u32 block);
  bool holds(u64 sector) const { return sector >= first_ && sector < end_; }

  // [read or written]: sectors that any block touched, and the sum of what each block touched.
  std::array<u64, 2> distinct{}, by_blocks{};

 private:
  struct Unmap {
    std::size_t bytes;
    void operator()(u32* stamps) const;
  };
  u64 first_, end_;
  // [sector][read or written]: 1 + the number of the last block that touched it
  std::unique_ptr<u32[], Unmap> stamps_;
};

class Trace {
 public:
  // writes: whether an instruction writes global memory. steps: how many instructions are enough.
  Trace(std::vector<bool> writes, u64 enough) : writes_(std::move(writes)), enough_(enough) {}

  void add_range(u64 start, u64 end) { ranges.emplace_back(start, end); }
  bool is_enough() const {
    return steps_ >= MOST_STEPS || (steps_ >= enough_ && blocks.size() >= LEAST_BLOCKS);
  }
  void begin_block(int num_warps) { blocks.emplace_back(num_warps); }
  void begin(int warp, int pc) { blocks.back()[warp].push_back({.pc = u32(pc)}); }
  void end(int warp, bool is_blocked);  // a blocked instruction runs again
  void shared(int warp, const u32* addresses, u32 lanes, int size);
  void global(int warp, const u64* addresses, u32 lanes, int size);
  void barrier(int warp, int id, int threads);
  void bulk_rows(int warp, u64 address, u32 bytes);  // in global memory
  void bulk_shared(int warp, u32 bytes);
  void mbarrier(int warp, int index, u32 phase);
  // Sort the steps of each run through a basic block by rank. Both arrays are by instruction.
  void reorder(const i32* basic_blocks, const i32* ranks);

  std::vector<std::vector<std::vector<Step>>> blocks;  // [block][warp]
  std::vector<Sectors> ranges;

 private:
  void touch(Step& step, u64 sector, bool writes);

  std::vector<bool> writes_;
  u64 enough_, steps_ = 0;
};

// Cycles that shared memory needs for an access.
struct Wavefronts {
  int all;      // in each group of lanes, as many as the bank with most different words has
  int without;  // without conflicts: one for each group, whose accesses fill at most 128 bytes
};
Wavefronts wavefronts(const u32* addresses, u32 lanes, int size);

}  // namespace ptx
