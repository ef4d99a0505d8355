// The state of the machine: one block at a time, its warps, their registers and clocks.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "mbarrier.h"
#include "memory.h"
#include "trace.h"
#include "types.h"

namespace ptx {

struct Warp;
struct Instruction;

// Runs one instruction for the lanes whose bits are set.
using Function = void (*)(Warp&, const Instruction&, u32 lanes);

struct Instruction {
  Function function;
  int guard;     // byte offset of a predicate, or -1
  bool negated;  // the guard
  int pc;
  int place;  // in the order in which divided lanes run
  const i32* operands;  // offsets of registers and plain integers, outputs first; -1: not wanted
  int count;
  mutable int tensor;  // the tensor that this instruction touched last: most instructions touch one
};

// Lanes of a warp that are elsewhere, because a branch divided them.
struct Lanes {
  int pc;
  u32 mask;
};

// cp.async of one warp: what it writes to shared memory.
struct Copy {
  const Instruction* instruction;
  u32 lanes;
  std::array<u32, 32> to;
  std::array<std::array<u8, 16>, 32> data;
  int size;
};

// A wgmma of one warp, or a move of its result, which run at the latest at the wait.
struct Delayed {
  const Instruction* instruction;
  int group;                                // the number of the commit that includes it
  void (*complete)(Warp&, const Delayed&);  // null if it has run; it is kept until its wait
  std::array<std::array<u32, 32>, 4> a{};   // registers of A, or the value of a move in a[0]
  u64 a_descriptor = 0, b_descriptor = 0;
  bool accumulates = false;  // a wgmma
  bool value_known = false;  // a move
};

enum class State { ready, at_barrier, blocked, done };

struct Machine;

struct Warp : Knowledge {
  Machine& machine;
  int id;
  char* registers;
  State state = State::ready;
  int pc = 0;
  u32 active = ALL;  // lanes that execute; all others are in `elsewhere` or have returned
  std::vector<Lanes> elsewhere{};
  int merge_place = 0;  // the lowest place of lanes in `elsewhere`
  int barrier = 0;   // the barrier that the warp waits at
  std::vector<Copy> open_copies{};
  std::deque<std::vector<Copy>> copies{};
  std::vector<Delayed> delayed{};
  int wgmma_commits = 0;
  std::deque<BulkStore> stores{};
  int stores_issued = 0;
  u32 store_clock = 0;                 // of the last bulk copy to global memory
  std::array<int, 32> bulk_commits{};  // of each thread
  Waiting waiting{};
  int cluster_arrivals = 0;
  std::vector<int> register_counts{};  // of each setmaxnreg

  u32 lanes_synced =
      0;  // the clock up to which the lanes of this warp have synchronised with each other

  Stamp bulk_now() const { return stamp(MAX_WARPS + id, store_clock); }
  Stamp now() const { return stamp(id, clocks[id]); }
  // Whether another lane of this warp made an access that has not been synchronised with the lanes
  // of this warp.
  bool other_lane(Stamp s, u8 its_lane, u8 lane) const {
    return warp_of(s) == id && clock_of(s) > lanes_synced && its_lane != lane &&
           its_lane != NO_LANE && lane != NO_LANE;
  }
  void tick();  // later accesses differ from earlier ones
  void sync_lanes() { lanes_synced = clocks[id]; }
  u32 alive() const;  // lanes that have not returned
  // Report the first lane that an instruction needs and that does not execute it.
  void expect(const Instruction& instruction, u32 lanes, u32 needed);
  template <class T> const T* at(i32 offset) const {
    return reinterpret_cast<const T*>(registers + offset);
  }
  template <class T> T* at(i32 offset) { return reinterpret_cast<T*>(registers + offset); }
  void settle();  // continue with the lanes that are furthest behind
  void split(int pc, u32 lanes);
  void report_unfinished();
};

// How a launch runs, see Schedule in machine.py.
struct Schedule {
  u64 seed;  // 0: warps and blocks in order
  i32 late_copies, late_wgmma, checks;
};

struct Barrier {
  int arrived = 0;    // threads
  int expected = 0;   // threads; 0: all threads that have not returned
  Knowledge known{};  // by those that arrived
};

// Of a cluster of one block.
struct ClusterBarrier {
  int arrived = 0, phases = 0;  // warps; phases that are complete
  Knowledge known{};            // by those that arrived in this phase
  Knowledge complete{};         // by those that arrived in earlier ones
};

struct Machine {
  Schedule schedule;
  std::mt19937_64 generator;
  int num_warps;
  int block;  // number of the block, in order
  std::array<i32, 3> grid;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::map<u32, MBarrier> mbarriers;  // by address
  ClusterBarrier cluster_barrier;
  u64 progress = 0;  // counts events that may let a waiting warp go on
  Parameters parameters;
  SharedMemory shared;
  GlobalMemory global;
  Faults faults;
  Trace* trace = nullptr;  // what runs is recorded here
  const Instruction* code = nullptr;

  u32 random(u32 below) { return u32(generator() % below); }
  void arrive(Warp& warp, int barrier, int expected, bool waits);
  void release_barriers();
  // Let copies that wait for someone to need them arrive.
  void land_awaited();
  // Report what is left of bulk copies, and let them write.
  void end_block();
};

// control.cpp. Report lanes that a mask names and that do not execute an instruction with the
// others.
void expect_named(Warp& warp, const Instruction& instruction, u32 lanes, i32 mask);

// mbarrier.cpp. The barrier that one lane names, or null after a report.
MBarrier* find_mbarrier(Warp& warp, const Instruction& instruction, int lane, u32 address,
                        Access access);
void expect_bytes(Machine& machine, MBarrier& barrier, i64 bytes);  // negative: bytes came
// Report a copy of a phase that has ended without its bytes.
void report_unexpected(Machine& machine, const MBarrier& barrier, const BulkLoad& load);
// Report copies that nobody waited for and bytes that do not add up, where a barrier ends.
void report_left(Machine& machine, const MBarrier& barrier);
// Report a warp that waits forever for an mbarrier; false: it waits for none.
bool report_mbarrier(const Warp& warp);

// bulk.cpp
void land(Machine& machine, MBarrier& barrier, const BulkLoad& load);

template <class F> void for_each_lane(u32 lanes, F f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

// Thrown where a clock would overflow and checks would go wrong.
struct ClockOverflow {};

}  // namespace ptx
