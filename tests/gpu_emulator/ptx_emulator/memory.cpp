#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptx {
namespace {

constexpr uint32_t kSeveralThreads = 0xffffffffu;  // as a reader of global memory

// Readers of shared memory: a thread's number, all of one warp, or threads of several warps.
constexpr int32_t kThreadsOfWarp = 1 << 16, kThreadsOfSeveralWarps = 1 << 17;

int32_t warp_of(int32_t who) { return who >= kThreadsOfWarp ? who - kThreadsOfWarp : who / 32; }

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

SharedMemory::SharedMemory(int64_t bytes, int64_t threads)
    : bytes(bytes), storage(bytes + 128), cells(bytes), fences(threads) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data());
  base = storage.data() + (128 - address % 128) % 128;
}

void SharedMemory::begin_block() {
  first_epoch = ++epoch;
  std::fill(storage.begin(), storage.end(), uint8_t{0xff});
}

// Whether `other`, which accessed a byte at that time, is not ordered before `access`.
bool SharedMemory::conflicts(int32_t other, uint32_t other_epoch, uint32_t other_warp_epoch,
                             const Access& access) const {
  if (other < 0 || other_epoch != epoch || other == access.thread) return false;
  if (other == kThreadsOfSeveralWarps || warp_of(other) != warp_of(access.thread)) return true;
  return other_warp_epoch == access.warp_epoch;
}

void SharedMemory::add_reader(Cell& cell, const Access& access) const {
  const bool others = cell.reader >= 0 && cell.read_epoch == epoch && cell.reader != access.thread;
  const int32_t warp = warp_of(access.thread);
  if (!others)
    cell.reader = access.thread;
  else if (cell.reader != kThreadsOfSeveralWarps && warp_of(cell.reader) == warp)
    cell.reader = kThreadsOfWarp + warp;
  else
    cell.reader = kThreadsOfSeveralWarps;
  cell.read_epoch = epoch, cell.read_warp_epoch = access.warp_epoch;
}

void SharedMemory::set_writer(Cell& cell, const Access& access) const {
  cell.writer = access.thread, cell.write_epoch = epoch, cell.write_warp_epoch = access.warp_epoch;
  cell.write_fences = fences[access.thread].count;
}

// Whether a fence lies between a write and the access by a tensor core: the writer's, or after a barrier the
// reader's.
bool SharedMemory::is_fenced(const Cell& cell, const Access& access) const {
  return fences[cell.writer].count > cell.write_fences || fences[access.thread].epoch > cell.write_epoch;
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
    const bool after_write = conflicts(cell.writer, cell.write_epoch, cell.write_warp_epoch, access);
    if (access.written != nullptr) {
      const bool same = base[access.address + i] == access.written[i];  // a copy, as in global memory
      if (after_write && !same) wrong = "shared memory: write after another thread's write without a barrier";
      if (conflicts(cell.reader, cell.read_epoch, cell.read_warp_epoch, access))
        wrong = "shared memory: write after another thread's read without a barrier";
      set_writer(cell, access);
    } else {
      if (after_write) wrong = "shared memory: read of another thread's write without a barrier";
      if (cell.writer < 0 || cell.write_epoch < first_epoch)
        wrong = "shared memory: read of what nobody wrote";
      else if (access.by_tensor_core && !is_fenced(cell, access))
        wrong = "shared memory: read by a tensor core of a write without fence.proxy.async";
      add_reader(cell, access);
    }
    if (cell.copied_in == first_epoch)
      wrong = "shared memory: access to the destination of an asynchronous copy before its wait";
  }
  return wrong;
}

}  // namespace ptx
