// What warps of Hopper do together: elect a lane, share registers, meet the cluster's other blocks.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

// Operands: destination (-1: not wanted), a predicate, mask. The lowest lane is elected.
void elect(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  expect_named(warp, instruction, lanes, o[2]);
  const u32* masks = warp.at<u32>(o[2]);
  u32 leaders[32], elected = 0;
  for_each_lane(lanes, [&](int lane) {
    leaders[lane] = std::countr_zero(masks[lane] & lanes);
    elected |= u32(int(leaders[lane]) == lane) << lane;
  });
  if (o[0] >= 0) put(warp.registers + o[0], leaders, lanes);
  put_predicate(warp.registers + o[1], elected, lanes);
}

// Operand: a number of registers. All warps of a warpgroup must set the same ones in turn.
void set_registers(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  const std::size_t number = warp.register_counts.size();
  warp.register_counts.push_back(instruction.operands[0]);
  const int first = warp.id / 4 * 4;
  for (int id = first; id < std::min(first + 4, warp.machine.num_warps); ++id) {
    const std::vector<int>& others = warp.machine.warps[id].register_counts;
    if (others.size() > number && others[number] != instruction.operands[0])
      warp.machine.faults.add(Kind::registers, warp, instruction, NO_LANE, 0, 0, -1, id);
  }
}

const Register warp_opcodes[] = {{"elect", elect}, {"setmaxnreg", set_registers}};

// ---- the barrier of a cluster of one block ------------------------------------------------------

void complete_phase(Machine& machine) {
  ClusterBarrier& barrier = machine.cluster_barrier;
  const auto lives = [](const Warp& warp) { return warp.state != State::done; };
  if (barrier.arrived < std::count_if(machine.warps.begin(), machine.warps.end(), lives)) return;
  barrier.complete.join(barrier.known);
  barrier.known = {};
  barrier.arrived = 0;
  ++barrier.phases;
  ++machine.progress;
}

void arrive(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, warp.alive());
  ++warp.cluster_arrivals;
  ++warp.machine.cluster_barrier.arrived;
  warp.machine.cluster_barrier.known.join(warp);
  warp.tick();
  complete_phase(warp.machine);
}

void wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, warp.alive());
  ClusterBarrier& barrier = warp.machine.cluster_barrier;
  if (barrier.phases < warp.cluster_arrivals) complete_phase(warp.machine);
  if (barrier.phases < warp.cluster_arrivals) {
    --warp.pc;
    warp.state = State::blocked;
    return;
  }
  warp.sync_lanes();
  warp.join(barrier.complete);
}

const Register cluster_opcodes[] = {
    {"barrier.cluster.arrive", arrive},
    {"barrier.cluster.wait", wait},
};

}  // namespace
}  // namespace ptx
