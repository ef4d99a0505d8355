// Opcodes that treat each lane alone: OPCODE("add.s32 add.u32", (u32 a, u32 b) { return a + b; })
//
// The types of the function are those of the operands. bool is a predicate. machine.py reads them
// from the signature.
#pragma once

#include <map>
#include <string>

#include "machine.h"

namespace ptx {

struct Opcode {
  Function function;
  std::string
      signature;  // types, the destination's first; empty: translate.py has a function for it
};

std::map<std::string, Opcode>& opcodes();

// Registers an opcode by its spellings in PTX, separated by spaces.
struct Register {
  Register(const std::string& spellings, Function function, const std::string& signature = "");
};

template <class T> std::string name_of() {
  if constexpr (std::is_same_v<T, bool>) return "pred";
  if constexpr (std::is_same_v<T, f16>) return "f16";
  if constexpr (std::is_same_v<T, bf16>) return "bf16";
  const char kind = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 's' : 'u';
  return kind + std::to_string(8 * sizeof(T));
}

template <class F, class Call = decltype(&F::operator())> struct Lanewise;

template <class F, class Result, class... Args> struct Lanewise<F, Result (F::*)(Args...) const> {
  static std::string signature() { return ((name_of<Result>()) + ... + (" " + name_of<Args>())); }

  template <class T> static T read(const char* source, int lane) {
    if constexpr (std::is_same_v<T, bool>)
      return *reinterpret_cast<const u32*>(source) >> lane & 1;
    else
      return from_cell<T>(reinterpret_cast<const Cell<T>*>(source)[lane]);
  }

  static void run(Warp& warp, const Instruction& instruction, u32 lanes) {
    run_all(warp, instruction, lanes, std::index_sequence_for<Args...>{});
  }

  template <std::size_t... I> static void run_all(Warp& warp, const Instruction& instruction,
                                                  u32 lanes, std::index_sequence<I...>) {
    const char* const sources[] = {warp.registers + instruction.operands[1 + I]...};
    char* const to = warp.registers + instruction.operands[0];
    if constexpr (std::is_same_v<Result, bool>) {
      u32 bits[32];
      for (int lane = 0; lane < 32; ++lane)
        bits[lane] = u32(F{}(read<Args>(sources[I], lane)...)) << lane;
      u32 all = 0;
      for (int lane = 0; lane < 32; ++lane) all |= bits[lane];
      put_predicate(to, all, lanes);
    } else {
      Cell<Result> cells[32];
      for (int lane = 0; lane < 32; ++lane)
        cells[lane] = to_cell<Result>(F{}(read<Args>(sources[I], lane)...));
      if constexpr (std::is_same_v<Result, f32>)
        for (u32& cell : cells) cell = canonical(cell);
      put(to, cells, lanes);
    }
  }
};

#define OPCODE(spellings, ...) PTX_OPCODE(__COUNTER__, spellings, __VA_ARGS__)
#define PTX_OPCODE(number, ...) PTX_NUMBERED(number, __VA_ARGS__)
#define PTX_NUMBERED(number, spellings, ...)                                 \
  using Lanewise##number = Lanewise<decltype([] __VA_ARGS__)>;               \
  static const Register registered##number{spellings, Lanewise##number::run, \
                                           Lanewise##number::signature()};

}  // namespace ptx
