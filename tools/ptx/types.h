// Types of PTX, and how a value lies in a register: one cell a lane, of 4 bytes or, for 64-bit
// types, of 8 bytes.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using f32 = float;
using f64 = double;
// clang-format off
struct f16 { u16 bits; };
struct bf16 { u16 bits; };
// clang-format on

constexpr u32 ALL = 0xffffffff;

template <class T> using Cell = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T> inline T from_cell(Cell<T> cell) {
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>)
    return T{u16(cell)};
  else if constexpr (sizeof(T) == sizeof(cell))
    return std::bit_cast<T>(cell);
  else
    return T(cell);
}

template <class T> inline Cell<T> to_cell(T value) {
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>)
    return value.bits;
  else if constexpr (sizeof(T) == sizeof(Cell<T>))
    return std::bit_cast<Cell<T>>(value);
  else
    return Cell<T>(std::make_unsigned_t<T>(value));
}

// Write the cells of some lanes.
template <class C> inline void put(char* to, const C* cells, u32 lanes) {
  C* out = reinterpret_cast<C*>(to);
  if (lanes == ALL) {
    std::memcpy(out, cells, 32 * sizeof(C));
    return;
  }
  for (int lane = 0; lane < 32; ++lane) out[lane] = lanes >> lane & 1 ? cells[lane] : out[lane];
}

inline void put_predicate(char* to, u32 bits, u32 lanes) {
  u32* out = reinterpret_cast<u32*>(to);
  *out = (*out & ~lanes) | (bits & lanes);
}

// ---- 16-bit floats ------------------------------------------------------------------------------

inline f32 widen(bf16 x) { return std::bit_cast<f32>(u32(x.bits) << 16); }

inline bf16 to_bf16(f32 x) {
  const u32 bits = std::bit_cast<u32>(x);
  const u32 rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return bf16{u16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded >> 16)};
}

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;  // of GCC 12 and Clang 15
#endif
inline f32 widen(f16 x) { return f32(std::bit_cast<Half>(x.bits)); }
inline f16 to_f16(f32 x) { return f16{x != x ? u16(0x7fff) : std::bit_cast<u16>(Half(x))}; }

template <class T> inline u32 pack(T low, T high) { return low.bits | u32(high.bits) << 16; }

// The NaN that GPUs return, whatever the operands were.
constexpr u32 CANONICAL_NAN = 0x7fffffff;
inline u32 canonical(u32 bits) { return (bits & 0x7fffffff) > 0x7f800000 ? CANONICAL_NAN : bits; }

// A denormal becomes zero of the same sign (.ftz).
inline f32 flush(f32 x) {
  const u32 bits = std::bit_cast<u32>(x);
  return bits & 0x7f800000 ? x : std::bit_cast<f32>(bits & 0x80000000);
}
inline f64 flush(f64 x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }

}  // namespace ptx
