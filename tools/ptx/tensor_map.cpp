// tensormap: maps that a kernel makes in shared memory and copies to global memory.
#include "tensor_map.h"

#include "lanes.h"

namespace ptx {

bool TensorMap::is_valid() const {
  if (rank < 1 || rank > MOST_DIMENSIONS || element > 12 || swizzle > 3 || interleave != 0)
    return false;
  if (address % 16 != 0 || (fill_nan && !is_float())) return false;
  for (int k = 0; k < rank; ++k) {
    if (dims[k] == 0 || box[k] == 0 || box[k] > 256 || element_strides[k] != 1) return false;
    if (k > 0 && (strides[k - 1] % 16 != 0 || strides[k - 1] >> 40 != 0)) return false;
  }
  const u32 row = box[0] * element_bytes();
  return row % 16 == 0 && (swizzle == 0 || row <= swizzle_bytes());
}

namespace {

// Operands: address, offset, a value, then four integers: the place of the field and its bytes,
// what to add to the value, and whether the value has 64 bits.
void replace(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* o = instruction.operands;
  SharedMemory& shared = warp.machine.shared;
  for_each_lane(lanes, [&](int lane) {
    const u32 map = warp.at<u32>(o[0])[lane] + u32(o[1]), word = map + u32(o[3] & ~3);
    const u64 value = (o[6] ? warp.at<u64>(o[2])[lane] : warp.at<u32>(o[2])[lane]) + u64(o[5]);
    const int size = std::max(o[4], 4);
    if (shared.valid(warp, instruction, &word, 1, size) == 0) return;
    if (warp.machine.schedule.checks) shared.check_write({warp, instruction, u8(lane), word, size});
    std::memcpy(shared.at(map + u32(o[3])), &value, o[4]);
  });
}

// Operands: global address, offset, shared address, offset. All lanes copy one map.
void copy(Warp& warp, const Instruction& instruction, u32 lanes) {
  warp.expect(instruction, lanes, ALL);
  constexpr int SIZE = sizeof(TensorMap);
  const i32* o = instruction.operands;
  Machine& machine = warp.machine;
  const u64 to = *warp.at<u64>(o[0]) + u64(i64(o[1]));
  const u32 from = *warp.at<u32>(o[2]) + u32(o[3]);
  if (machine.global.valid(warp, instruction, &to, 1, SIZE) == 0 ||
      machine.shared.valid(warp, instruction, &from, 1, SIZE) == 0)
    return;
  if (machine.schedule.checks) {
    machine.shared.check_read({warp, instruction, NO_LANE, from, SIZE});
    machine.global.check_write({warp, instruction, NO_LANE, to, SIZE});
  }
  std::memcpy(machine.global.at(to), machine.shared.at(from), SIZE);
}

const Register map_opcodes[] = {{"tensormap.replace", replace}, {"tensormap.copy", copy}};

}  // namespace
}  // namespace ptx
