// Floating-point arithmetic, comparisons and conversions.
//
// Instructions that GPUs approximate (ex2, lg2, rcp, sqrt, tanh, div.full) are computed to float32
// accuracy. translate.py removes the modifiers .rn, .approx and .full, which change nothing here.
// clang-format off
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace ptx {
namespace {

const f32 NAN32 = std::bit_cast<f32>(CANONICAL_NAN);

// Without .NaN, one NaN yields the other operand; -0 is less than +0.
template <class T> T larger(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return b != b || a > b ? a : b;
}
template <class T> T smaller(T a, T b) {
  if (a == b) return std::signbit(a) ? a : b;
  return b != b || a < b ? a : b;
}
// Opcodes of a type T; FLUSH makes zero of denormal operands and results (.ftz).
#define ARITHMETIC(T, FTZ, FLUSH)                                                                  \
  OPCODE("add" FTZ "." #T, (T a, T b) { return FLUSH(FLUSH(a) + FLUSH(b)); })                      \
  OPCODE("sub" FTZ "." #T, (T a, T b) { return FLUSH(FLUSH(a) - FLUSH(b)); })                      \
  OPCODE("mul" FTZ "." #T, (T a, T b) { return FLUSH(FLUSH(a) * FLUSH(b)); })                      \
  OPCODE("div" FTZ "." #T, (T a, T b) { return FLUSH(FLUSH(a) / FLUSH(b)); })                      \
  OPCODE("fma" FTZ "." #T " mad" FTZ "." #T,                                                       \
         (T a, T b, T c) { return FLUSH(std::fma(FLUSH(a), FLUSH(b), FLUSH(c))); })                \
  OPCODE("neg" FTZ "." #T, (T a) { return FLUSH(-a); })                                            \
  OPCODE("abs" FTZ "." #T, (T a) { return FLUSH(std::fabs(a)); })                                  \
  OPCODE("sqrt" FTZ "." #T, (T a) { return std::sqrt(FLUSH(a)); })                                 \
  OPCODE("max" FTZ "." #T, (T a, T b) { return larger(FLUSH(a), FLUSH(b)); })                      \
  OPCODE("min" FTZ "." #T, (T a, T b) { return smaller(FLUSH(a), FLUSH(b)); })
ARITHMETIC(f32, "", )
ARITHMETIC(f32, ".ftz", flush)
ARITHMETIC(f64, "", )

OPCODE("max.NaN.f32", (f32 a, f32 b) { return a != a || b != b ? NAN32 : larger(a, b); })
OPCODE("min.NaN.f32", (f32 a, f32 b) { return a != a || b != b ? NAN32 : smaller(a, b); })

#define APPROXIMATED(FTZ, FLUSH)                                                                   \
  OPCODE("ex2" FTZ ".f32", (f32 a) { return FLUSH(exp2f(FLUSH(a))); })                             \
  OPCODE("lg2" FTZ ".f32", (f32 a) { return log2f(FLUSH(a)); })                                    \
  OPCODE("rsqrt" FTZ ".f32", (f32 a) { return 1.0f / sqrtf(FLUSH(a)); })                           \
  OPCODE("rcp" FTZ ".f32", (f32 a) { return FLUSH(1.0f / FLUSH(a)); })
APPROXIMATED("", )
APPROXIMATED(".ftz", flush)
OPCODE("tanh.f32", (f32 a) { return tanhf(a); })
OPCODE("rcp.f64", (f64 a) { return 1.0 / a; })
// GPUs return the upper 32 bits only; the code around refines them.
OPCODE("rcp.ftz.f64", (f64 a) {
  return std::bit_cast<f64>(std::bit_cast<u64>(flush(1.0 / flush(a))) >> 32 << 32);
})

// Comparisons that end in u are true for NaN.
f32 widen(f32 x) { return x; }
f64 widen(f64 x) { return x; }
#define COMPARISONS(T)                                                                             \
  OPCODE("setp.eq." #T, (T a, T b) { return widen(a) == widen(b); })                               \
  OPCODE("setp.ne." #T, (T a, T b) { return widen(a) < widen(b) || widen(a) > widen(b); })         \
  OPCODE("setp.lt." #T, (T a, T b) { return widen(a) < widen(b); })                                \
  OPCODE("setp.le." #T, (T a, T b) { return widen(a) <= widen(b); })                               \
  OPCODE("setp.gt." #T, (T a, T b) { return widen(a) > widen(b); })                                \
  OPCODE("setp.ge." #T, (T a, T b) { return widen(a) >= widen(b); })                               \
  OPCODE("setp.equ." #T, (T a, T b) { return !(widen(a) < widen(b) || widen(a) > widen(b)); })     \
  OPCODE("setp.neu." #T, (T a, T b) { return !(widen(a) == widen(b)); })                           \
  OPCODE("setp.ltu." #T, (T a, T b) { return !(widen(a) >= widen(b)); })                           \
  OPCODE("setp.leu." #T, (T a, T b) { return !(widen(a) > widen(b)); })                            \
  OPCODE("setp.gtu." #T, (T a, T b) { return !(widen(a) <= widen(b)); })                           \
  OPCODE("setp.geu." #T, (T a, T b) { return !(widen(a) < widen(b)); })                            \
  OPCODE("setp.num." #T, (T a, T b) { return widen(a) == widen(a) && widen(b) == widen(b); })      \
  OPCODE("setp.nan." #T, (T a, T b) { return widen(a) != widen(a) || widen(b) != widen(b); })
COMPARISONS(f32)
COMPARISONS(f64)
COMPARISONS(f16)
COMPARISONS(bf16)

// The sum, rounded to odd: rounded again to fewer bits, in any direction, it is what one rounding
// of the exact sum is.
f64 sum_to_odd(f64 a, f64 b) {
  const f64 sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  const u64 bits = std::bit_cast<u64>(sum);
  if (error == 0 || !std::isfinite(sum) || (bits & 1)) return sum;
  return std::bit_cast<f64>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}
f32 toward_zero(f64 exact) {
  const f32 nearest = f32(exact);
  return std::fabs(f64(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}
f32 downward(f64 exact) {
  const f32 nearest = f32(exact);
  constexpr f32 lowest = -std::numeric_limits<f32>::infinity();
  return f64(nearest) > exact ? std::nextafterf(nearest, lowest) : nearest;
}
f32 fma_downward(f32 a, f32 b, f32 c) {
  const f64 product = f64(a) * b, sum = sum_to_odd(product, c);
  if (sum == 0) return std::signbit(product) || std::signbit(c) ? -0.0f : 0.0f;
  return downward(sum);
}
OPCODE("add.rz.f32", (f32 a, f32 b) { return toward_zero(sum_to_odd(a, b)); })
OPCODE("fma.rm.f32", (f32 a, f32 b, f32 c) { return fma_downward(a, b, c); })

// ---- conversions --------------------------------------------------------------------------------

OPCODE("cvt.f32.bf16", (bf16 a) { return widen(a); })
OPCODE("cvt.bf16.f32", (f32 a) { return to_bf16(a); })
OPCODE("cvt.f32.f16", (f16 a) { return widen(a); })
OPCODE("cvt.f16.f32", (f32 a) { return to_f16(a); })
OPCODE("cvt.bf16x2.f32", (f32 high, f32 low) { return pack(to_bf16(low), to_bf16(high)); })
OPCODE("cvt.f16x2.f32", (f32 high, f32 low) { return pack(to_f16(low), to_f16(high)); })
OPCODE("cvt.f64.f32", (f32 a) -> f64 { return a; })
OPCODE("cvt.f32.f64", (f64 a) -> f32 { return a; })
OPCODE("cvt.f32.u16", (u16 a) -> f32 { return a; })
OPCODE("cvt.f32.s16", (i16 a) -> f32 { return a; })
OPCODE("cvt.f32.u32", (u32 a) -> f32 { return a; })
OPCODE("cvt.f32.s32", (i32 a) -> f32 { return a; })
OPCODE("cvt.f32.u64", (u64 a) -> f32 { return a; })
OPCODE("cvt.f32.s64", (i64 a) -> f32 { return a; })
OPCODE("cvt.f64.u32", (u32 a) -> f64 { return a; })
OPCODE("cvt.f64.s32", (i32 a) -> f64 { return a; })
OPCODE("cvt.f64.u64", (u64 a) -> f64 { return a; })
OPCODE("cvt.f64.s64", (i64 a) -> f64 { return a; })
OPCODE("cvt.rzi.f32.f32", (f32 a) { return truncf(a); })
OPCODE("cvt.rni.f32.f32", (f32 a) { return nearbyintf(a); })
OPCODE("cvt.rmi.f32.f32", (f32 a) { return floorf(a); })
OPCODE("cvt.rpi.f32.f32", (f32 a) { return ceilf(a); })
OPCODE("cvt.sat.f32.f32", (f32 a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; })

// NaN becomes 0, and what is out of range the nearest integer.
i32 to_s32(f32 a) {
  if (a != a) return 0;
  return a >= 2147483648.0f ? 0x7fffffff : a < -2147483648.0f ? i32(0x80000000) : i32(a);
}
u32 to_u32(f32 a) {
  if (!(a > 0)) return 0;
  return a >= 4294967296.0f ? ~0u : u32(a);
}
OPCODE("cvt.rzi.s32.f32", (f32 a) { return to_s32(a); })
OPCODE("cvt.rni.s32.f32", (f32 a) { return to_s32(nearbyintf(a)); })
OPCODE("cvt.rmi.s32.f32", (f32 a) { return to_s32(floorf(a)); })
OPCODE("cvt.rpi.s32.f32", (f32 a) { return to_s32(ceilf(a)); })
OPCODE("cvt.rzi.u32.f32", (f32 a) { return to_u32(a); })
OPCODE("cvt.rni.u32.f32", (f32 a) { return to_u32(nearbyintf(a)); })

// ---- 16-bit arithmetic --------------------------------------------------------------------------

// Round a float64 once: to float32 towards zero, with the last bit set if that was not exact, then
// to nearest.
bf16 once(f64 exact) {
  const f32 nearer = toward_zero(exact);
  const bool inexact = nearer == nearer && f64(nearer) != exact;
  return to_bf16(std::bit_cast<f32>(std::bit_cast<u32>(nearer) | u32(inexact)));
}
bf16 fused(bf16 a, bf16 b, bf16 c) { return once(sum_to_odd(f64(widen(a)) * widen(b), widen(c))); }

bf16 sum(bf16 a, bf16 b) { return to_bf16(widen(a) + widen(b)); }
f16 sum(f16 a, f16 b) { return to_f16(widen(a) + widen(b)); }

// A sum, and a product of two f16, may be rounded to float32 first: it has more than twice as many
// digits.
OPCODE("add.bf16", (bf16 a, bf16 b) { return sum(a, b); })
OPCODE("sub.bf16", (bf16 a, bf16 b) { return to_bf16(widen(a) - widen(b)); })
OPCODE("mul.bf16", (bf16 a, bf16 b) { return once(f64(widen(a)) * widen(b)); })
OPCODE("add.f16", (f16 a, f16 b) { return sum(a, b); })
OPCODE("sub.f16", (f16 a, f16 b) { return to_f16(widen(a) - widen(b)); })
OPCODE("mul.f16", (f16 a, f16 b) { return to_f16(widen(a) * widen(b)); })

constexpr auto SUM = [](auto a, auto b) { return sum(a, b); };

// Apply f to the low halves and to the high halves of packed floats of type T.
template <class T, class F, class... U> u32 each(F f, U... packed) {
  return pack(f(T{u16(packed)}...), f(T{u16(packed >> 16)}...));
}
OPCODE("add.bf16x2", (u32 a, u32 b) { return each<bf16>(SUM, a, b); })
OPCODE("add.f16x2", (u32 a, u32 b) { return each<f16>(SUM, a, b); })
OPCODE("fma.bf16", (bf16 a, bf16 b, bf16 c) { return fused(a, b, c); })
OPCODE("fma.bf16x2", (u32 a, u32 b, u32 c) { return each<bf16>(fused, a, b, c); })

}  // namespace
}  // namespace ptx
