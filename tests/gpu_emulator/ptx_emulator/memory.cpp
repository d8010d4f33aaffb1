#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptx {
namespace {

constexpr uint32_t kSeveralThreads = 0xffffffffu;  // as a reader of global memory

// Who accessed shared memory: a thread by its number in the cluster; more than one reader as all threads of a
// warp, threads of several warps of a block, or threads of several blocks.
constexpr int32_t kThreadsOfWarp = 1 << 16, kThreadsOfBlock = 1 << 17, kThreadsOfSeveralBlocks = 1 << 18;
constexpr int32_t kWarpsPerBlock = kMostThreads / 32;

int32_t who(const Access& access) { return access.rank * kMostThreads + access.thread; }
int32_t warp_of(int32_t who) { return who >= kThreadsOfWarp ? who - kThreadsOfWarp : who / 32; }
int32_t rank_of(int32_t who) {
  if (who >= kThreadsOfSeveralBlocks) return -1;
  return who >= kThreadsOfBlock ? who - kThreadsOfBlock : warp_of(who) / kWarpsPerBlock;
}

}  // namespace

void GlobalMemory::allow(uint64_t begin, uint64_t size, bool writable) {
  if (size == 0) return;
  Range added{begin, begin + size, writable, {}, {}};
  const auto joins = [&](const Range& r) {
    if (r.end <= added.begin || added.end <= r.begin) return false;
    added = {
        std::min(r.begin, added.begin), std::max(r.end, added.end), r.writable || added.writable, {}, {}};
    return true;
  };
  while (true) {
    const auto found = std::find_if(ranges.begin(), ranges.end(), joins);
    if (found == ranges.end()) break;
    ranges.erase(found);
  }
  ranges.push_back(added);
  last = 0;
}

void GlobalMemory::begin_launch() {
  for (Range& r : ranges) r.writers.clear(), r.readers.clear();
}

GlobalMemory::Range* GlobalMemory::find(const Access& access) {
  for (size_t i = 0; i < ranges.size(); ++i) {
    const size_t k = (last + i) % ranges.size();
    Range& r = ranges[k];
    if (access.address < r.begin || access.address + access.bytes > r.end) continue;
    last = k;
    return &r;
  }
  return nullptr;
}

const char* GlobalMemory::check(const Access& access, uint32_t thread) {
  Range* const r = find(access);
  const bool write = access.written != nullptr;
  if (r == nullptr) return write ? "global memory: write out of bounds" : "global memory: read out of bounds";
  if (r->writers.empty()) r->writers.assign(r->end - r->begin, 0), r->readers.assign(r->end - r->begin, 0);
  const char* wrong = write && !r->writable ? "global memory: write to an input" : nullptr;
  const uint64_t first = access.address - r->begin;
  for (int i = 0; i < access.bytes; ++i) {
    const char* const found = check_byte(access, thread, i, r->writers[first + i], r->readers[first + i]);
    wrong = found != nullptr ? found : wrong;
  }
  return wrong;
}

const char* GlobalMemory::check_byte(const Access& access, uint32_t thread, int i, uint32_t& writer,
                                     uint32_t& reader) {
  const char* wrong = nullptr;
  if (access.written != nullptr) {
    // Threads may write the same value: Triton stores a value from every thread that has a copy of it.
    const uint8_t now = reinterpret_cast<const uint8_t*>(access.address)[i];
    if (writer != 0 && writer != thread && now != access.written[i])
      wrong = "global memory: two threads of a launch write different values to one place";
    if (reader != 0 && reader != thread)
      wrong = "global memory: write of what another thread of the launch reads";
    writer = thread;
  } else {
    if (writer != 0 && writer != thread)
      wrong = "global memory: read of what another thread of the launch writes";
    if (writer != 0 && access.read_only)
      wrong = "global memory: read-only load (.nc) of what the launch writes";
    reader = reader != 0 && reader != thread ? kSeveralThreads : thread;
  }
  return wrong;
}

SharedMemory::SharedMemory(int64_t bytes, int64_t blocks_of_cluster)
    : bytes(bytes), storage(bytes + 128), cells(bytes), fences(blocks_of_cluster * kMostThreads) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data());
  base = storage.data() + (128 - address % 128) % 128;
}

void SharedMemory::begin_block(uint32_t epoch) {
  first_epoch = now = epoch;
  std::fill(fences.begin(), fences.end(), Fences{});
  std::fill(storage.begin(), storage.end(), uint8_t{0xff});
}

// Whether `other`, which accessed a byte of this block, is not ordered before `access`.
bool SharedMemory::conflicts(const Trace& other, const Access& access) const {
  if (other.who < 0 || other.epoch < first_epoch || other.who == who(access)) return false;
  if (other.arrivals < access.acquired) return false;  // the barrier of the cluster lies between them
  if (rank_of(other.who) != access.rank) return true;
  if (other.epoch != access.block_epoch) return false;  // a barrier of their block
  if (other.who >= kThreadsOfBlock || warp_of(other.who) != warp_of(who(access))) return true;
  return other.warp_epoch == access.warp_epoch;
}

void SharedMemory::add_reader(Trace& reader, const Access& access) const {
  Trace all{who(access), access.block_epoch, access.warp_epoch, access.arrivals};
  if (conflicts(reader, access)) {
    if (rank_of(reader.who) != access.rank)
      all.who = kThreadsOfSeveralBlocks;
    else if (reader.who >= kThreadsOfBlock || warp_of(reader.who) != warp_of(all.who))
      all.who = kThreadsOfBlock + access.rank;
    else
      all.who = kThreadsOfWarp + warp_of(all.who);
    all.arrivals = std::max(all.arrivals, reader.arrivals);
  }
  reader = all;
}

void SharedMemory::set_writer(Cell& cell, const Access& access) const {
  cell.writer = {who(access), access.block_epoch, access.warp_epoch, access.arrivals};
  cell.write_fences = fences[who(access)].count;
}

void SharedMemory::fence(const Access& access) {
  Fences& of_thread = fences[who(access)];
  of_thread = {of_thread.count + 1, access.block_epoch, access.acquired};
}

// Whether a fence lies between a write and the access by a tensor core: the writer's, or after a barrier the
// reader's.
bool SharedMemory::is_fenced(const Cell& cell, const Access& access) const {
  const Trace& writer = cell.writer;
  const Fences& of_reader = fences[who(access)];
  return fences[writer.who].count > cell.write_fences || of_reader.acquired > writer.arrivals ||
         (rank_of(writer.who) == access.rank && of_reader.epoch > writer.epoch);
}

const char* SharedMemory::begin_copy(const Access& access) {
  const char* const wrong = check(access);
  for (int i = 0; i < access.bytes; ++i) cells[access.address + i].copied_in = first_epoch;
  memset(base + access.address, 0xff, access.bytes);
  return wrong;
}

void SharedMemory::finish_copy(const Access& access) {
  memcpy(base + access.address, access.written, access.bytes);
  for (int i = 0; i < access.bytes; ++i) {
    Cell& cell = cells[access.address + i];
    cell.copied_in = 0;
    set_writer(cell, access);
  }
}

const char* SharedMemory::check(const Access& access) {
  const char* wrong = nullptr;
  for (int i = 0; i < access.bytes; ++i) {
    Cell& cell = cells[access.address + i];
    const bool after_write = conflicts(cell.writer, access);
    if (access.written != nullptr) {
      const bool same = base[access.address + i] == access.written[i];  // a copy, as in global memory
      if (after_write && !same) wrong = "shared memory: write after another thread's write without a barrier";
      if (conflicts(cell.reader, access))
        wrong = "shared memory: write after another thread's read without a barrier";
      set_writer(cell, access);
    } else {
      if (after_write) wrong = "shared memory: read of another thread's write without a barrier";
      if (cell.writer.who < 0 || cell.writer.epoch < first_epoch)
        wrong = "shared memory: read of what nobody wrote";
      else if (access.by_tensor_core && !is_fenced(cell, access))
        wrong = "shared memory: read by a tensor core of a write without fence.proxy.async";
      add_reader(cell.reader, access);
    }
    if (cell.copied_in == first_epoch)
      wrong = "shared memory: access to the destination of an asynchronous copy before its wait";
  }
  return wrong;
}

}  // namespace ptx
