// Shared and global memory, and what is remembered of each access in order to find races.
//
// Each warp counts its synchronisations: its clock. Each warp also knows, for each other warp, up
// to which clock the accesses of that warp happened before its own next access; barriers exchange
// this knowledge (vector clocks). An access is a race if it conflicts with an earlier access that
// its warp does not know of. Clocks continue from block to block, so a stamp also tells whether it
// was made in the current block.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "types.h"

namespace ptx {

struct Warp;
struct Instruction;
struct Machine;

constexpr int MAX_WARPS = 32, CLOCK_BITS = 26;
// Who makes accesses: warps, and for each of them, after MAX_WARPS, its bulk copies.
constexpr int AGENTS = 2 * MAX_WARPS;
// Who reads shared memory asynchronously: the wgmmas of each warpgroup, the bulk copies of each
// warp.
constexpr int FIRST_STORES = MAX_WARPS / 4, READERS = FIRST_STORES + MAX_WARPS;
constexpr u32 LAST_CLOCK = (1u << CLOCK_BITS) - 1;
constexpr u8 NO_LANE = 255, SEVERAL_LANES = 254;
constexpr int OTHER_BLOCK = -2;  // instead of the warp of an access

using Clocks = std::array<u32, AGENTS>;
using Groups = std::array<int, READERS>;  // the number of a group of wgmmas, or of a bulk copy
using Stamp = u32;                        // of an access: the agent, and its clock

// What happened before a point; barriers pass it on.
struct Knowledge {
  Clocks clocks{};            // accesses to memory
  Clocks fenced{};            // those that a proxy fence has made visible to asynchronous accesses
  Groups finished{};          // asynchronous reads that ended
  std::vector<u32> landed{};  // for each mbarrier, how many of its phases were complete

  void join(const Knowledge& more);
  bool knows_phase(int mbarrier, u32 phase) const {
    return mbarrier < int(landed.size()) && landed[mbarrier] > phase;
  }
};

inline Stamp stamp(int warp, u32 clock) { return u32(warp) << CLOCK_BITS | clock; }
inline int warp_of(Stamp s) { return int(s >> CLOCK_BITS); }
inline u32 clock_of(Stamp s) { return s & LAST_CLOCK; }
inline bool known(Stamp s, const Clocks& clocks) { return clock_of(s) <= clocks[warp_of(s)]; }

// In the order of machine.py's KINDS.
enum class Kind : i32 {
  global_bounds,
  shared_bounds,
  parameter_bounds,
  global_misaligned,
  shared_misaligned,
  uninitialised,
  read_after_write,
  write_after_read,
  write_after_write,
  lanes_of_a_warp,
  copy_in_flight,
  wgmma_reads,
  proxy_fence,
  global_race,
  divergence,
  descriptor,
  deadlock,
  unfinished,
  abandoned,
  bulk_reads,
  no_mbarrier,
  mbarrier_in_use,
  too_many_arrivals,
  too_few_bytes,
  bytes_left,
  lacks_bytes,
  has_bytes,
  lacks_arrivals,
  tensor_map,
  registers,
  branch_bounds,
};

struct Fault {
  Kind kind;
  i32 pc, block, warp, lane;
  i32 other_pc, other_warp;  // the earlier access; -1: unknown, or none
  i32 size;
  u64 address;
  u64 times;
};

// The first fault of each kind at each instruction, and how often it occurred.
struct Faults {
  std::vector<Fault> list;
  std::map<std::pair<Kind, int>, std::size_t> index;
  void add(Kind kind, const Warp& warp, const Instruction& instruction, int lane, u64 address,
           int size, int other_pc = -1, int other_warp = -1);
};

// The last write and the last read of a granule of memory, which is as large as the smallest access
// of the program.
struct Record {
  Stamp writer, reader;
  Stamp other_reader;  // of global memory: a read that does not happen before the last one
  i32 writer_pc, reader_pc;
  u8 writer_lane, reader_lane;
  bool atomic;  // the last write was atomic

  void wrote(Stamp now, int pc, u8 lane, bool is_atomic);
  void read(Stamp now, int pc, u8 lane);
};

// Records of 0, which take memory when they are first touched: most of a large tensor never is.
class Records {
 public:
  explicit Records(std::size_t count = 0);
  Record& operator[](std::size_t k) { return records_[k]; }
  const Record& operator[](std::size_t k) const { return records_[k]; }

 private:
  struct Unmap {
    std::size_t bytes;
    void operator()(Record* records) const;
  };
  std::unique_ptr<Record[], Unmap> records_;
};

// wgmma and bulk copies access memory through the asynchronous proxy. Operations on an mbarrier,
// and polls of it, are atomic for each other.
enum class Access { plain, atomic, mbarrier, poll, wgmma, bulk, bulk_atomic };

// An access of one lane.
struct Touch {
  Warp& warp;
  const Instruction& instruction;
  u8 lane;
  u64 address;
  int size;
  Access access = Access::plain;
  const u8* data = nullptr;  // what is written, if that is known
  int mbarrier = -1;         // of a bulk copy to shared memory: where it reports its bytes,
  u32 phase = 0;             // and in which phase

  bool is_bulk() const { return access >= Access::bulk; }
  bool is_async() const { return access >= Access::wgmma; }
  bool is_atomic() const {
    return access == Access::atomic || access == Access::mbarrier || access == Access::bulk_atomic;
  }
  void report(Kind kind, int other_pc = -1, int other_warp = -1) const;
};

// Each memory has `valid`, which returns the lanes whose access is inside and aligned and reports
// the others, and `check_read` and `check_write`, which check an access and remember it.
class SharedMemory {
 public:
  using Address = u32;
  static constexpr u32 BASE = 1024;  // of its addresses; aligned for the swizzles of wgmma

  void resize(int bytes, int granule_shift, int num_warps, bool checks);
  void begin_block(u32 clock, bool checks);
  u8* at(u32 address) { return bytes_.data() + (address - BASE); }
  bool all_valid(const u32* addresses, u32 lanes, int size) const;
  u32 valid(Warp& warp, const Instruction& instruction, const u32* addresses, u32 lanes, int size);
  void check_read(const Touch& touch);
  void check_write(const Touch& touch);
  void begin_copy(u32 address, int size, int change);  // change: 1 begins, -1 ends
  bool inside(u32 address, u64 size) const {
    return address >= BASE && address - BASE + size <= u64(size_);
  }

 private:
  // A bulk copy to 16 bytes.
  struct Landing {
    int mbarrier;
    u32 phase;
  };
  // The last asynchronous reads of 16 bytes.
  struct AsyncRead {
    int group;
    i32 pc;
  };
  bool in_flight(const Touch& touch, std::size_t g) const;
  void check_async_readers(const Touch& touch);
  void check_readers(const Touch& touch, std::size_t g);
  void note_async_read(const Touch& touch);
  std::size_t first(u64 address) const { return (address - BASE) >> shift_; }

  std::vector<u8> bytes_;
  int shift_ = 0, size_ = 0;
  u32 block_start_ = 0;
  Records records_;
  std::vector<std::vector<u32>> read_clocks_;  // [warp][granule]
  std::vector<u8> copies_;                     // unfinished copies to each granule
  std::vector<Landing> landings_;              // [16 bytes]
  // [reader][16 bytes], empty until the first read.
  std::array<std::vector<AsyncRead>, READERS> async_reads_;
};

// A range of memory that the kernel may touch.
struct Tensor {
  u64 start, end;
  Records records;
};

class GlobalMemory {
 public:
  using Address = u64;
  std::vector<Tensor> tensors;  // sorted, without overlaps
  int shift = 0;
  u32 block_start = 0;

  void add(u64 start, u64 end, bool checks);
  u8* at(u64 address) { return reinterpret_cast<u8*>(address); }
  u32 valid(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes, int size);
  void check_read(const Touch& touch);
  void check_write(const Touch& touch);
  bool inside(u64 address, u64 size);

 private:
  Tensor* find(u64 address);
  bool concurrent(const Warp& warp, Stamp s) const;
  void report_race(const Touch& touch, int other_pc, Stamp other) const;
  bool all_in(const Tensor& tensor, const u64* addresses, u32 lanes, int size) const;
};

// Addresses count from the first parameter.
class Parameters {
 public:
  using Address = u64;
  const u8* bytes;
  i64 size;

  const u8* at(u64 address) const { return bytes + address; }
  u32 valid(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes,
            int length);
  void check_read(const Touch&) {}
};

}  // namespace ptx
