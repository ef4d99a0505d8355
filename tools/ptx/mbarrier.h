// Barriers in shared memory that count arrivals and bytes, and bulk copies.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <vector>

#include "memory.h"
#include "tensor_map.h"

namespace ptx {

// A box of a tensor, and its place in shared memory. A plain bulk copy moves a box of bytes.
struct Box {
  TensorMap map{};
  std::array<i32, TensorMap::MOST_DIMENSIONS> start{};  // coordinates of the first element
  u32 shared = 0;

  u32 row_bytes() const { return map.box[0] * map.element_bytes(); }
  u32 bytes() const;
  // The address in shared memory of 16 bytes of the box.
  u32 place(u32 offset) const;
  // Call f(offset in the box, address, bytes) for each row's part that is inside of the tensor.
  template <class F> void for_rows(F f) const;
};

// A bulk copy to shared memory.
struct BulkLoad {
  const Instruction* instruction;
  int warp, lane;
  u32 phase;  // of its barrier, when it was issued
  Box box;
  std::vector<u8> data{};
};

// A bulk copy from shared memory.
struct BulkStore {
  const Instruction* instruction;
  int lane, group;  // the number of its thread's commit that includes it
  int number;       // among the warp's bulk copies
  u32 clock;        // of its writes
  int reduction;    // as translate numbers them; 0: a store
  Box box;
  std::vector<u8> data{};
  bool has_read = false, waited_read = false, has_written = false, waited = false;
};

struct MBarrier {
  int index;  // of Knowledge::landed
  u32 address;
  bool is_valid = false;  // initialised, and not invalidated
  u32 count = 0;          // arrivals of each phase
  u32 pending = 0;        // arrivals that this phase lacks
  i64 bytes = 0;          // that this phase lacks
  u32 phase = 0;          // phases that are complete
  u32 first_phase = 0;    // since it was initialised
  u32 phases_waited_for = 0;
  Knowledge arrived{};          // of those that arrived in this phase
  Knowledge complete{};         // of those that arrived in earlier ones
  std::deque<BulkLoad> late{};  // that have not landed
  BulkLoad last{};              // without its data
  const Instruction* last_expect = nullptr;
};

// What a warp polls.
struct Waiting {
  u32 address = 0;  // of an mbarrier; 0: none
  const Instruction* instruction = nullptr;
  bool has_tried = false;
};

template <class F> void Box::for_rows(F f) const {
  const i64 first = std::max<i64>(0, -i64(start[0])),
            end = std::min<i64>(map.box[0], i64(map.dims[0]) - start[0]);
  if (first >= end) return;
  const u32 size = map.element_bytes(), rows = bytes() / row_bytes();
  for (u32 row = 0; row < rows; ++row) {
    u64 address = map.address + (start[0] + first) * size;
    bool is_inside = true;
    u32 rest = row;
    for (int k = 1; k < map.rank; ++k) {
      const i64 at = i64(start[k]) + rest % map.box[k];
      rest /= map.box[k];
      is_inside &= at >= 0 && at < i64(map.dims[k]);
      address += at * map.strides[k - 1];
    }
    if (is_inside) f(row * row_bytes() + u32(first) * size, address, u32(end - first) * size);
  }
}

}  // namespace ptx
