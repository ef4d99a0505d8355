// Tensor maps as this machine keeps them; tensor_map.py makes them.
#pragma once

#include "types.h"

namespace ptx {

// The dimension whose elements are adjacent comes first.
struct TensorMap {
  static constexpr int MOST_DIMENSIONS = 5;

  u64 address;
  u64 dims[MOST_DIMENSIONS];
  u64 strides[MOST_DIMENSIONS - 1];      // bytes from one index to the next, of all but the first
  u32 box[MOST_DIMENSIONS];              // the elements that one copy moves
  u32 element_strides[MOST_DIMENSIONS];  // 1 each
  u8 rank;
  u8 element;  // as PTX numbers them in tensormap.replace
  u8 swizzle;  // 0: none, 1: 32, 2: 64, 3: 128 bytes
  u8 fill_nan;
  u8 interleave;  // 0: none, the only one that the machine knows
  u8 unused[3];

  u32 element_bytes() const {
    constexpr u8 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    return bytes[element];
  }
  bool is_float() const { return element >= 6; }
  u32 swizzle_bytes() const { return swizzle == 0 ? 16 : 16u << swizzle; }
  // Whether CUDA's driver would make such a map; a kernel can make any.
  bool is_valid() const;
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace ptx
