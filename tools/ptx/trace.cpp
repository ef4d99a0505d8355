#include "trace.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

namespace ptx {

// ---- shared memory ------------------------------------------------------------------------------

Wavefronts wavefronts(const u32* addresses, u32 lanes, int size) {
  constexpr int BANKS = 32, WORD = 4;
  const int words = std::max(1, size / WORD), group = BANKS / words;
  Wavefronts total{};
  for (int first = 0; first < 32; first += group) {
    std::array<std::array<u32, 32>, BANKS> found;  // the different words of each bank
    std::array<u8, BANKS> count{};
    int most = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int k = 0; k < words; ++k) {
        const u32 word = addresses[lane] / WORD + k, bank = word % BANKS;
        u32* const begin = found[bank].data();
        if (std::find(begin, begin + count[bank], word) != begin + count[bank]) continue;
        begin[count[bank]++] = word;
        most = std::max(most, int(count[bank]));
      }
    }
    total.all += most;
    total.without += most > 0;
  }
  return total;
}

// ---- global memory ------------------------------------------------------------------------------

Sectors::Sectors(u64 start, u64 end)
    : first_(start / SECTOR),
      end_((end + SECTOR - 1) / SECTOR),
      stamps_(nullptr, {(end_ - first_) * 2 * sizeof(u32)}) {
  const std::size_t bytes = stamps_.get_deleter().bytes;
  if (bytes == 0) return;
  constexpr int access = PROT_READ | PROT_WRITE, how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const mapped = mmap(nullptr, bytes, access, how, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  stamps_.reset(static_cast<u32*>(mapped));
}

void Sectors::Unmap::operator()(u32* stamps) const { munmap(stamps, bytes); }

bool Sectors::touch(u64 sector, bool writes, u32 block) {
  u32* const stamps = stamps_.get() + 2 * (sector - first_);
  u32& stamp = stamps[writes];
  // What has been written in this launch is not read from DRAM.
  const bool is_fresh = stamp == 0 && (writes || stamps[1] == 0);
  distinct[writes] += is_fresh;
  by_blocks[writes] += stamp != block + 1 && (writes || stamps[1] != block + 1);
  stamp = block + 1;
  return is_fresh;
}

// ---- the trace ----------------------------------------------------------------------------------

void Trace::end(int warp, bool is_blocked) {
  if (is_blocked)
    blocks.back()[warp].pop_back();
  else
    ++steps_;
}

void Trace::shared(int warp, const u32* addresses, u32 lanes, int size) {
  const Wavefronts cycles = wavefronts(addresses, lanes, size);
  Step& step = blocks.back()[warp].back();
  step.wavefronts += u16(cycles.all);
  step.conflicts += u16(cycles.all - cycles.without);
}

void Trace::global(int warp, const u64* addresses, u32 lanes, int size) {
  Step& step = blocks.back()[warp].back();
  const bool writes = writes_[step.pc];
  std::array<u64, 64> seen;  // an access of 32 bytes may touch two sectors
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1) {
    const u64 address = addresses[std::countr_zero(lanes)];
    for (u64 sector = address / SECTOR; sector <= (address + size - 1) / SECTOR; ++sector) {
      if (std::find(seen.begin(), seen.begin() + count, sector) != seen.begin() + count) continue;
      seen[count++] = sector;
      touch(step, sector, writes);
    }
  }
}

void Trace::touch(Step& step, u64 sector, bool writes) {
  ++step.sectors;
  for (Sectors& range : ranges)
    if (range.holds(sector)) {
      step.fresh += range.touch(sector, writes, u32(blocks.size() - 1));
      return;
    }
}

void Trace::barrier(int warp, int id, int threads) {
  blocks.back()[warp].back().barrier = u16(id + 16 * ((threads + 31) / 32));
}

void Trace::bulk_rows(int warp, u64 address, u32 bytes) {
  Step& step = blocks.back()[warp].back();
  for (u64 sector = address / SECTOR; sector <= (address + bytes - 1) / SECTOR; ++sector)
    touch(step, sector, writes_[step.pc]);
}

void Trace::bulk_shared(int warp, u32 bytes) {
  blocks.back()[warp].back().wavefronts += u16(bytes / 128);
}

// Phases of each mbarrier are numbered from 1.
void Trace::mbarrier(int warp, int index, u32 phase) {
  blocks.back()[warp].back().phase = u32(index) << 20 | (phase + 1);
}

void Trace::reorder(const i32* basic_blocks, const i32* ranks) {
  for (auto& block : blocks)
    for (std::vector<Step>& steps : block) {
      const auto same_run = [&](const Step& a, const Step& b) {
        return a.pc < b.pc && basic_blocks[a.pc] == basic_blocks[b.pc];
      };
      for (auto begin = steps.begin(); begin != steps.end();) {
        auto end = begin + 1;
        while (end != steps.end() && same_run(end[-1], *end)) ++end;
        std::sort(begin, end,
                  [&](const Step& a, const Step& b) { return ranks[a.pc] < ranks[b.pc]; });
        begin = end;
      }
    }
}

}  // namespace ptx

extern "C" {

int ptx_traced_blocks(const void* trace) {
  return int(static_cast<const ptx::Trace*>(trace)->blocks.size());
}

// Sums over the traced blocks, for each instruction: how often a warp ran it, its wavefronts, its
// conflicts and its sectors. counts: [instruction][4].
void ptx_trace_counts(const void* trace, ptx::u64* counts) {
  for (const auto& block : static_cast<const ptx::Trace*>(trace)->blocks)
    for (const auto& warp : block)
      for (const ptx::Step& step : warp) {
        ptx::u64* const count = counts + 4 * step.pc;
        count[0] += 1;
        count[1] += step.wavefronts;
        count[2] += step.conflicts;
        count[3] += step.sectors;
      }
}

// For each range of memory: distinct sectors that were read and written, and the same summed over
// blocks. sectors: [range][4].
void ptx_trace_sectors(const void* trace, ptx::u64* sectors) {
  for (const ptx::Sectors& range : static_cast<const ptx::Trace*>(trace)->ranges) {
    *sectors++ = range.distinct[0];
    *sectors++ = range.distinct[1];
    *sectors++ = range.by_blocks[0];
    *sectors++ = range.by_blocks[1];
  }
}

void ptx_reorder(void* trace, const ptx::i32* basic_blocks, const ptx::i32* ranks) {
  static_cast<ptx::Trace*>(trace)->reorder(basic_blocks, ranks);
}

void ptx_free_trace(void* trace) { delete static_cast<ptx::Trace*>(trace); }

}  // extern "C"
