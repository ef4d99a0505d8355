#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "machine.h"

namespace ptx {

void Faults::add(Kind kind, const Warp& warp, const Instruction& instruction, int lane, u64 address,
                 int size, int other_pc, int other_warp) {
  const auto [place, is_new] = index.try_emplace({kind, instruction.pc}, list.size());
  if (is_new)
    list.push_back({kind, instruction.pc, warp.machine.block, warp.id, lane, other_pc, other_warp,
                    size, address, 1});
  else
    ++list[place->second].times;
}

void Touch::report(Kind kind, int other_pc, int other_warp) const {
  warp.machine.faults.add(kind, warp, instruction, lane, address, size, other_pc, other_warp);
}

void Knowledge::join(const Knowledge& more) {
  const auto join_all = [](auto& known, const auto& others) {
    for (std::size_t k = 0; k < others.size(); ++k) known[k] = std::max(known[k], others[k]);
  };
  join_all(clocks, more.clocks);
  join_all(fenced, more.fenced);
  join_all(finished, more.finished);
  if (landed.size() < more.landed.size()) landed.resize(more.landed.size());
  join_all(landed, more.landed);
}

void Record::wrote(Stamp now, int pc, u8 lane, bool is_atomic) {
  atomic =
      is_atomic && (atomic || writer != now);  // a plain write with the same stamp still counts
  writer = now;
  writer_pc = pc;
  writer_lane = lane;
}

void Record::read(Stamp now, int pc, u8 lane) {
  reader_lane = reader == now && reader_lane != lane ? SEVERAL_LANES : lane;
  reader = now;
  reader_pc = pc;
}

Records::Records(std::size_t count) : records_(nullptr, {count * sizeof(Record)}) {
  if (count == 0) return;
  constexpr int access = PROT_READ | PROT_WRITE, how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const mapped = mmap(nullptr, count * sizeof(Record), access, how, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  records_.reset(static_cast<Record*>(mapped));
}

void Records::Unmap::operator()(Record* records) const { munmap(records, bytes); }

// ---- shared memory ------------------------------------------------------------------------------

void SharedMemory::resize(int bytes, int granule_shift, int num_warps, bool checks) {
  size_ = bytes;
  shift_ = granule_shift;
  bytes_.assign(std::size_t(bytes) + 64, 0xff);
  if (!checks) return;
  const std::size_t granules = (std::size_t(bytes) >> shift_) + 1;
  records_ = Records(granules);
  read_clocks_.assign(num_warps, std::vector<u32>(granules, 0));
  copies_.assign(granules, 0);
  landings_.resize(bytes / 16 + 1);
}

void SharedMemory::begin_block(u32 clock, bool checks) {
  block_start_ = clock;
  if (!checks) return;
  std::fill(bytes_.begin(), bytes_.end(), 0xff);  // NaN in every float type
  std::fill(copies_.begin(), copies_.end(), 0);
  for (auto& reads : async_reads_) std::fill(reads.begin(), reads.end(), AsyncRead{});
}

bool SharedMemory::all_valid(const u32* addresses, u32 lanes, int size) const {
  u32 low = ~0u, high = 0, bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const u32 address = lanes >> lane & 1 ? addresses[lane] : BASE;
    low = std::min(low, address);
    high = std::max(high, address);
    bits |= address;
  }
  return low >= BASE && high - BASE + size <= u32(size_) && bits % size == 0;
}

namespace {
// Report the lanes that are not inside or not aligned, and return the others.
template <class A, class Inside> u32 report_invalid(Warp& warp, const Instruction& instruction,
                                                    const A* addresses, u32 lanes, int size,
                                                    Kind bounds, Kind misaligned, Inside inside) {
  for_each_lane(lanes, [&](int lane) {
    const bool is_inside = inside(addresses[lane]);
    if (is_inside && addresses[lane] % size == 0) return;
    Touch{warp, instruction, u8(lane), addresses[lane], size}.report(is_inside ? misaligned
                                                                               : bounds);
    lanes &= ~(1u << lane);
  });
  return lanes;
}
}  // namespace

u32 SharedMemory::valid(Warp& warp, const Instruction& instruction, const u32* addresses, u32 lanes,
                        int size) {
  if (warp.machine.trace != nullptr) warp.machine.trace->shared(warp.id, addresses, lanes, size);
  if (all_valid(addresses, lanes, size)) return lanes;
  return report_invalid(warp, instruction, addresses, lanes, size, Kind::shared_bounds,
                        Kind::shared_misaligned,
                        [&](u64 a) { return a >= BASE && a + size <= u64(BASE) + size_; });
}

// A bulk copy is in flight for each warp that does not know of the end of the mbarrier's phase.
bool SharedMemory::in_flight(const Touch& touch, std::size_t g) const {
  if (copies_[g]) return true;
  const Stamp writer = records_[g].writer;
  if (warp_of(writer) < MAX_WARPS || clock_of(writer) <= block_start_) return false;
  const Landing& landing = landings_[g << shift_ >> 4];
  return !touch.warp.knows_phase(landing.mbarrier, landing.phase);
}

void SharedMemory::check_read(const Touch& touch) {
  Warp& warp = touch.warp;
  const bool is_async = touch.is_async();
  for (std::size_t g = first(touch.address); g <= first(touch.address + touch.size - 1); ++g) {
    Record& record = records_[g];
    const Stamp writer = record.writer;
    const bool by_bulk = warp_of(writer) >= MAX_WARPS;
    const bool harmless = touch.access == Access::poll && record.atomic;
    const auto report = [&](Kind kind) {
      touch.report(kind, record.writer_pc, warp_of(writer) % MAX_WARPS);
    };
    if (in_flight(touch, g))
      report(Kind::copy_in_flight);
    else if (clock_of(writer) <= block_start_)
      touch.report(Kind::uninitialised);
    else if (!by_bulk && !known(writer, warp.clocks) && !harmless)
      report(Kind::read_after_write);
    else if (warp.other_lane(writer, record.writer_lane, touch.lane) && !harmless)
      report(Kind::lanes_of_a_warp);
    else if (is_async && !by_bulk && !known(writer, warp.fenced))
      report(Kind::proxy_fence);
    if (is_async) continue;
    read_clocks_[warp.id][g] = clock_of(warp.now());
    record.read(warp.now(), touch.instruction.pc, touch.lane);
  }
  if (is_async) note_async_read(touch);
}

void SharedMemory::note_async_read(const Touch& touch) {
  const Warp& warp = touch.warp;
  const bool is_bulk = touch.is_bulk();
  std::vector<AsyncRead>& reads = async_reads_[is_bulk ? FIRST_STORES + warp.id : warp.id / 4];
  if (reads.empty()) reads.resize(size_ / 16 + 1);
  reads[(touch.address - BASE) / 16] = {is_bulk ? warp.stores_issued : warp.wgmma_commits + 1,
                                        touch.instruction.pc};
}

void SharedMemory::check_write(const Touch& touch) {
  Warp& warp = touch.warp;
  const bool same = touch.data && std::memcmp(at(touch.address), touch.data, touch.size) == 0;
  const bool atomic = touch.is_atomic();
  for (std::size_t g = first(touch.address); g <= first(touch.address + touch.size - 1); ++g) {
    Record& record = records_[g];
    const Stamp writer = record.writer;
    const bool by_bulk = warp_of(writer) >= MAX_WARPS;
    const bool harmless = same || (atomic && record.atomic);
    const auto report = [&](Kind kind) {
      touch.report(kind, record.writer_pc, warp_of(writer) % MAX_WARPS);
    };
    if (in_flight(touch, g))
      report(Kind::copy_in_flight);
    else if (atomic && clock_of(writer) <= block_start_)
      touch.report(Kind::uninitialised);
    else if (!by_bulk && !known(writer, warp.clocks) && !harmless)
      report(Kind::write_after_write);
    else if (warp.other_lane(writer, record.writer_lane, touch.lane) && !harmless)
      report(Kind::lanes_of_a_warp);
    else if (touch.is_bulk() && !by_bulk && !known(writer, warp.fenced))
      report(Kind::proxy_fence);
    if (touch.access != Access::mbarrier) check_readers(touch, g);
    record.wrote(touch.is_bulk() ? stamp(MAX_WARPS + warp.id, warp.clocks[warp.id]) : warp.now(),
                 touch.instruction.pc, touch.lane, atomic);
  }
  check_async_readers(touch);
  if (touch.is_bulk()) landings_[(touch.address - BASE) / 16] = {touch.mbarrier, touch.phase};
}

// A wgmma reads until one of the four warps that issued it has waited, a bulk copy until its thread
// has waited; barriers tell other warps.
void SharedMemory::check_async_readers(const Touch& touch) {
  const std::size_t chunk = (touch.address - BASE) / 16;
  for (int reader = 0; reader < READERS; ++reader) {
    const std::vector<AsyncRead>& reads = async_reads_[reader];
    if (reads.empty() || reads[chunk].group <= touch.warp.finished[reader]) continue;
    touch.report(reader < FIRST_STORES ? Kind::wgmma_reads : Kind::bulk_reads, reads[chunk].pc);
  }
}

void SharedMemory::check_readers(const Touch& touch, std::size_t g) {
  const Record& record = records_[g];
  for (int other = 0; other < int(read_clocks_.size()); ++other) {
    if (read_clocks_[other][g] <= touch.warp.clocks[other]) continue;
    const int pc = warp_of(record.reader) == other ? record.reader_pc : -1;
    touch.report(Kind::write_after_read, pc, other);
  }
  if (touch.warp.other_lane(record.reader, record.reader_lane, touch.lane))
    touch.report(Kind::lanes_of_a_warp, record.reader_pc, touch.warp.id);
}

void SharedMemory::begin_copy(u32 address, int size, int change) {
  for (std::size_t g = first(address); g <= first(address + size - 1); ++g) copies_[g] += change;
}

u32 Parameters::valid(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes,
                      int length) {
  for_each_lane(lanes, [&](int lane) {
    if (addresses[lane] <= u64(size) && addresses[lane] + length <= u64(size)) return;
    Touch{warp, instruction, u8(lane), addresses[lane], length}.report(Kind::parameter_bounds);
    lanes &= ~(1u << lane);
  });
  return lanes;
}

// ---- global memory ------------------------------------------------------------------------------

void GlobalMemory::add(u64 start, u64 end, bool checks) {
  Tensor& tensor = tensors.emplace_back();
  tensor.start = start;
  tensor.end = end;
  if (checks) tensor.records = Records(((end - start) >> shift) + 2);
}

Tensor* GlobalMemory::find(u64 address) {
  auto next = std::upper_bound(tensors.begin(), tensors.end(), address,
                               [](u64 a, const Tensor& t) { return a < t.start; });
  if (next == tensors.begin()) return nullptr;
  --next;
  return address < next->end ? &*next : nullptr;
}

bool GlobalMemory::inside(u64 address, u64 size) {
  const Tensor* tensor = find(address);
  return tensor != nullptr && address + size <= tensor->end;
}

bool GlobalMemory::all_in(const Tensor& tensor, const u64* addresses, u32 lanes, int size) const {
  u64 low = ~u64(0), high = 0, bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const bool on = lanes >> lane & 1;
    low = std::min(low, on ? addresses[lane] : ~u64(0));
    high = std::max(high, on ? addresses[lane] : 0);
    bits |= on ? addresses[lane] : 0;
  }
  return low >= tensor.start && high <= tensor.end - size && bits % size == 0;
}

u32 GlobalMemory::valid(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes,
                        int size) {
  if (warp.machine.trace != nullptr) warp.machine.trace->global(warp.id, addresses, lanes, size);
  if (instruction.tensor < int(tensors.size())) {
    const Tensor& last = tensors[instruction.tensor];
    if (last.end - last.start >= u64(size) && all_in(last, addresses, lanes, size)) return lanes;
  }
  return report_invalid(warp, instruction, addresses, lanes, size, Kind::global_bounds,
                        Kind::global_misaligned, [&](u64 address) {
                          const Tensor* tensor = find(address);
                          if (tensor == nullptr) return false;
                          instruction.tensor = int(tensor - tensors.data());
                          return address + size <= tensor->end;
                        });
}

// Whether there was an access that may also happen after the warp's next one. Blocks run one after
// the other here, and in any order on a GPU.
bool GlobalMemory::concurrent(const Warp& warp, Stamp s) const {
  return clock_of(s) != 0 && (clock_of(s) <= block_start || !known(s, warp.clocks));
}

void GlobalMemory::report_race(const Touch& touch, int other_pc, Stamp other) const {
  const int other_warp = clock_of(other) <= block_start ? OTHER_BLOCK : warp_of(other) % MAX_WARPS;
  touch.report(Kind::global_race, other_pc, other_warp);
}

void GlobalMemory::check_read(const Touch& touch) {
  Warp& warp = touch.warp;
  Tensor& tensor = *find(touch.address);
  const u64 first = tensor.start >> shift, end = (touch.address + touch.size - 1) >> shift;
  for (u64 g = touch.address >> shift; g <= end; ++g) {
    Record& record = tensor.records[g - first];
    if (concurrent(warp, record.writer) ||
        warp.other_lane(record.writer, record.writer_lane, touch.lane))
      report_race(touch, record.writer_pc, record.writer);
    Stamp& other = record.other_reader;
    // No barrier will order a read of another block.
    const bool is_final = other != 0 && clock_of(other) <= block_start;
    if (!is_final && concurrent(warp, record.reader)) other = record.reader;
    record.read(warp.now(), touch.instruction.pc, touch.lane);
  }
}

void GlobalMemory::check_write(const Touch& touch) {
  Warp& warp = touch.warp;
  const bool same = touch.data && std::memcmp(at(touch.address), touch.data, touch.size) == 0;
  const bool atomic = touch.is_atomic();
  const Stamp now = touch.is_bulk() ? warp.bulk_now() : warp.now();
  Tensor& tensor = *find(touch.address);
  const u64 first = tensor.start >> shift, end = (touch.address + touch.size - 1) >> shift;
  for (u64 g = touch.address >> shift; g <= end; ++g) {
    Record& record = tensor.records[g - first];
    const auto races = [&](Stamp other, u8 lane) {
      return concurrent(warp, other) || warp.other_lane(other, lane, touch.lane);
    };
    if (!same && !(atomic && record.atomic) && races(record.writer, record.writer_lane))
      report_race(touch, record.writer_pc, record.writer);
    if (races(record.reader, record.reader_lane))
      report_race(touch, record.reader_pc, record.reader);
    else if (concurrent(warp, record.other_reader))
      report_race(touch, -1, record.other_reader);
    record.wrote(now, touch.instruction.pc, touch.lane, atomic);
  }
}

}  // namespace ptx
