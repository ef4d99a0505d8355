// Integer and bitwise arithmetic, comparisons, selection and conversion of integers.
// clang-format off
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

// An integer of twice as many bits.
template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
    std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 4, i64, i32>,
                       std::conditional_t<sizeof(T) == 4, u64, u32>>>;

OPCODE("mov.u16 mov.s16 mov.b16 mov.f16 mov.bf16", (u16 a) -> u16 { return a; })
OPCODE("mov.u32 mov.s32 mov.b32 mov.f32", (u32 a) { return a; })
OPCODE("mov.u64 mov.s64 mov.b64 mov.f64 cvta.to.global.u64 cvta.global.u64 cvta.param.u64", (u64 a) { return a; })
// Clusters have one block, so that each address is in it.
OPCODE("mapa.shared::cluster.u32", (u32 a, u32) { return a; })
OPCODE("mapa.u64", (u64 a, u32) { return a; })
OPCODE("mov.pred", (bool a) { return a; })

// Opcodes of B = 16, 32 and 64 bits.
#define FOR_EACH_WIDTH(B)                                                                          \
  OPCODE("add.u" #B " add.s" #B, (u##B a, u##B b) -> u##B { return a + b; })                       \
  OPCODE("sub.u" #B " sub.s" #B, (u##B a, u##B b) -> u##B { return a - b; })                       \
  OPCODE("mul.lo.u" #B " mul.lo.s" #B, (u##B a, u##B b) -> u##B { return Wide<u##B>(a) * b; })     \
  OPCODE("mad.lo.u" #B " mad.lo.s" #B,                                                             \
         (u##B a, u##B b, u##B c) -> u##B { return Wide<u##B>(a) * b + c; })                       \
  OPCODE("neg.s" #B, (u##B a) -> u##B { return 0 - a; })                                           \
  OPCODE("abs.s" #B, (u##B a) -> u##B { return i##B(a) < 0 ? 0 - a : a; })                         \
  OPCODE("mul.hi.u" #B, (u##B a, u##B b) -> u##B { return Wide<u##B>(a) * b >> B; })               \
  OPCODE("mul.hi.s" #B, (i##B a, i##B b) -> i##B { return Wide<i##B>(a) * b >> B; })               \
  OPCODE("min.u" #B, (u##B a, u##B b) { return std::min(a, b); })                                  \
  OPCODE("min.s" #B, (i##B a, i##B b) { return std::min(a, b); })                                  \
  OPCODE("max.u" #B, (u##B a, u##B b) { return std::max(a, b); })                                  \
  OPCODE("max.s" #B, (i##B a, i##B b) { return std::max(a, b); })                                  \
  OPCODE("and.b" #B, (u##B a, u##B b) -> u##B { return a & b; })                                   \
  OPCODE("or.b" #B, (u##B a, u##B b) -> u##B { return a | b; })                                    \
  OPCODE("xor.b" #B, (u##B a, u##B b) -> u##B { return a ^ b; })                                   \
  OPCODE("not.b" #B, (u##B a) -> u##B { return ~a; })                                              \
  /* Division by zero is unspecified in PTX; GPUs return all ones. */                              \
  OPCODE("div.u" #B, (u##B a, u##B b) -> u##B { return b == 0 ? ~u##B(0) : a / b; })               \
  OPCODE("div.s" #B, (i##B a, i##B b) -> i##B { return b == 0 ? -1 : Wide<i##B>(a) / b; })         \
  OPCODE("rem.u" #B, (u##B a, u##B b) -> u##B { return b == 0 ? ~u##B(0) : a % b; })               \
  OPCODE("rem.s" #B, (i##B a, i##B b) -> i##B { return b == 0 ? -1 : Wide<i##B>(a) % b; })         \
  /* Shifts by the width or more give 0, or the sign. */                                           \
  OPCODE("shl.b" #B, (u##B a, u32 b) -> u##B { return b >= B ? 0 : a << b; })                      \
  OPCODE("shr.u" #B " shr.b" #B, (u##B a, u32 b) -> u##B { return b >= B ? 0 : a >> b; })          \
  OPCODE("shr.s" #B, (i##B a, u32 b) -> i##B { return a >> std::min(b, B - 1u); })                 \
  OPCODE("setp.eq.u" #B " setp.eq.s" #B " setp.eq.b" #B, (u##B a, u##B b) { return a == b; })      \
  OPCODE("setp.ne.u" #B " setp.ne.s" #B " setp.ne.b" #B, (u##B a, u##B b) { return a != b; })      \
  OPCODE("setp.lt.u" #B " setp.lo.u" #B, (u##B a, u##B b) { return a < b; })                       \
  OPCODE("setp.le.u" #B " setp.ls.u" #B, (u##B a, u##B b) { return a <= b; })                      \
  OPCODE("setp.gt.u" #B " setp.hi.u" #B, (u##B a, u##B b) { return a > b; })                       \
  OPCODE("setp.ge.u" #B " setp.hs.u" #B, (u##B a, u##B b) { return a >= b; })                      \
  OPCODE("setp.lt.s" #B, (i##B a, i##B b) { return a < b; })                                       \
  OPCODE("setp.le.s" #B, (i##B a, i##B b) { return a <= b; })                                      \
  OPCODE("setp.gt.s" #B, (i##B a, i##B b) { return a > b; })                                       \
  OPCODE("setp.ge.s" #B, (i##B a, i##B b) { return a >= b; })
FOR_EACH_WIDTH(16)
FOR_EACH_WIDTH(32)
FOR_EACH_WIDTH(64)

OPCODE("add.u16x2 add.s16x2", (u32 a, u32 b) {
  return ((a + b) & 0xffff) | ((a >> 16) + (b >> 16)) << 16;
})
OPCODE("min.relu.s32", (i32 a, i32 b) { return std::max(0, std::min(a, b)); })
OPCODE("max.relu.s32", (i32 a, i32 b) { return std::max(0, std::max(a, b)); })
OPCODE("mul.wide.u16", (u16 a, u16 b) -> u32 { return u32(a) * b; })
OPCODE("mul.wide.s16", (i16 a, i16 b) -> i32 { return i32(a) * b; })
OPCODE("mul.wide.u32", (u32 a, u32 b) -> u64 { return u64(a) * b; })
OPCODE("mul.wide.s32", (i32 a, i32 b) -> i64 { return i64(a) * b; })
OPCODE("mad.wide.u16", (u16 a, u16 b, u32 c) -> u32 { return u32(a) * b + c; })
OPCODE("mad.wide.s16", (i16 a, i16 b, u32 c) -> u32 { return u32(i32(a) * b) + c; })
OPCODE("mad.wide.u32", (u32 a, u32 b, u64 c) -> u64 { return u64(a) * b + c; })
OPCODE("mad.wide.s32", (i32 a, i32 b, u64 c) -> u64 { return u64(i64(a) * b) + c; })
OPCODE("and.pred", (bool a, bool b) { return a && b; })
OPCODE("or.pred", (bool a, bool b) { return a || b; })
OPCODE("xor.pred", (bool a, bool b) { return a != b; })
OPCODE("not.pred", (bool a) { return !a; })
OPCODE("shf.l.wrap.b32", (u32 a, u32 b, u32 c) -> u32 {
  return (u64(b) << 32 | a) << (c & 31) >> 32;
})
OPCODE("shf.r.wrap.b32", (u32 a, u32 b, u32 c) -> u32 {
  return (u64(b) << 32 | a) >> (c & 31);
})

OPCODE("popc.b32", (u32 a) -> u32 { return std::popcount(a); })
OPCODE("popc.b64", (u64 a) -> u32 { return std::popcount(a); })
OPCODE("clz.b32", (u32 a) -> u32 { return std::countl_zero(a); })
OPCODE("clz.b64", (u64 a) -> u32 { return std::countl_zero(a); })
OPCODE("brev.b32", (u32 a) {
  u32 reversed = 0;
  for (int k = 0; k < 32; ++k) reversed |= (a >> k & 1) << (31 - k);
  return reversed;
})

// Extract `length` bits from bit `from`; a signed field is extended by its highest bit.
u32 extract(u32 a, u32 from, u32 length, bool is_signed) {
  from &= 255;
  length &= 255;
  if (length == 0) return 0;
  const u32 sign = is_signed ? a >> std::min(from + length - 1, 31u) & 1 : 0;
  const u32 field = from > 31 ? 0 : a >> from;
  const u32 valid = from > 31 ? 0 : std::min(length, 32 - from);
  const u32 mask = valid >= 32 ? ~0u : (1u << valid) - 1;
  return sign ? field | ~mask : field & mask;
}
OPCODE("bfe.u32", (u32 a, u32 b, u32 c) { return extract(a, b, c, false); })
OPCODE("bfe.s32", (u32 a, u32 b, u32 c) { return extract(a, b, c, true); })
OPCODE("bfe.u64", (u64 a, u32 b, u32 c) -> u64 {
  const u32 from = b & 255, length = c & 255;
  return (from > 63 ? 0 : a >> from) & (length > 63 ? ~u64(0) : (u64(1) << length) - 1);
})

// Put the low `length` bits of a into b at bit `to`.
template <class T> T insert(T a, T b, u32 to, u32 length) {
  constexpr u32 width = 8 * sizeof(T);
  to &= 255;
  length &= 255;
  if (to >= width || length == 0) return b;
  const T mask = (length >= width ? ~T(0) : (T(1) << length) - 1) << to;
  return (b & ~mask) | (a << to & mask);
}
OPCODE("bfi.b32", (u32 a, u32 b, u32 c, u32 d) { return insert(a, b, c, d); })
OPCODE("bfi.b64", (u64 a, u64 b, u32 c, u32 d) { return insert(a, b, c, d); })

// Each nibble of the selector picks one of eight bytes, or that byte's sign.
u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 nibble = selector >> (4 * k) & 15;
    const u32 byte = bytes >> (8 * (nibble & 7)) & 255;
    result |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * k);
  }
  return result;
}
OPCODE("prmt.b32", (u32 a, u32 b, u32 c) { return permute(a, b, c); })

OPCODE("lop3.b32", (u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
})

OPCODE("selp.b16 selp.u16 selp.s16", (u16 a, u16 b, bool p) -> u16 { return p ? a : b; })
OPCODE("selp.b32 selp.u32 selp.s32 selp.f32", (u32 a, u32 b, bool p) { return p ? a : b; })
OPCODE("selp.b64 selp.u64 selp.s64 selp.f64", (u64 a, u64 b, bool p) { return p ? a : b; })

// translate.py composes every conversion of integers from these.
OPCODE("extend.u8", (u8 a) -> u32 { return a; })
OPCODE("extend.s8", (i8 a) -> i32 { return a; })
OPCODE("extend.u16", (u16 a) -> u32 { return a; })
OPCODE("extend.s16", (i16 a) -> i32 { return a; })
OPCODE("extend.u32", (u32 a) -> u64 { return a; })
OPCODE("extend.s32", (i32 a) -> i64 { return a; })
OPCODE("truncate.u64", (u64 a) -> u32 { return u32(a); })

// mov between a register and a vector of registers.
OPCODE("pack.2x16", (u16 a, u16 b) -> u32 { return a | u32(b) << 16; })
OPCODE("pack.2x32", (u32 a, u32 b) -> u64 { return a | u64(b) << 32; })
OPCODE("pack.4x8", (u8 a, u8 b, u8 c, u8 d) -> u32 {
  return a | u32(b) << 8 | u32(c) << 16 | u32(d) << 24;
})
OPCODE("pack.4x16", (u16 a, u16 b, u16 c, u16 d) -> u64 {
  return a | u64(b) << 16 | u64(c) << 32 | u64(d) << 48;
})
OPCODE("unpack.4x8", (u32 a, u32 part) -> u8 { return u8(a >> (8 * part)); })
OPCODE("unpack.2x16", (u32 a, u32 part) -> u16 { return u16(a >> (16 * part)); })
OPCODE("unpack.4x16", (u64 a, u32 part) -> u16 { return u16(a >> (16 * part)); })
OPCODE("unpack.2x32", (u64 a, u32 part) -> u32 { return u32(a >> (32 * part)); })

}  // namespace
}  // namespace ptx
