// Global and shared memory with the checks of every access: bounds, alignment, races, initialisation.
//
// A check returns what is wrong, or null. It follows the happens-before relation, not the order in which the
// emulator happens to run threads: two threads of a block are ordered by a barrier only, two blocks of a
// cluster by the cluster's barrier (a thread's access comes before its next arrival, and that before what
// another thread does after the wait for it), and other blocks by nothing. For each byte it remembers the
// last writer and the last readers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

struct Access {
  uint64_t address;
  int bytes;
  const uint8_t* written;  // null for a load
  bool read_only;          // ld.global.nc, whose cache does not see stores of the same launch
  int thread;              // within the block
  uint32_t warp_epoch;     // number of barriers of its warp so far
  // Of shared memory only.
  int rank;                     // of the thread's block in its cluster
  uint32_t block_epoch;         // number of barriers of its block so far
  uint32_t arrivals;            // number of arrivals of the thread at the barrier of its cluster so far
  uint32_t acquired;            // number of those that other threads' accesses were seen to precede
  bool by_tensor_core = false;  // through the asynchronous proxy, which sees writes only after a fence
};

constexpr int kMostThreads = 1024;  // per block

// Device memory is host memory: an address is a pointer.
class GlobalMemory {
 public:
  // Allows accesses to [begin, begin + size). Overlapping ranges become one.
  void allow(uint64_t begin, uint64_t size, bool writable);
  void forget() { ranges.clear(), last = 0; }
  void begin_launch();
  // Whether the access lies inside a range that is allowed.
  bool contains(const Access& access) { return find(access) != nullptr; }
  // `thread` is unique within the launch, and not zero.
  const char* check(const Access& access, uint32_t thread);

 private:
  struct Range {
    uint64_t begin, end;
    bool writable;
    std::vector<uint32_t> writers, readers;  // per byte; empty if this launch has not touched the range
  };
  Range* find(const Access& access);
  static const char* check_byte(const Access& access, uint32_t thread, int i, uint32_t& writer,
                                uint32_t& reader);

  std::vector<Range> ranges;
  size_t last = 0;  // the range of the previous access, which is usually that of the next one
};

// The shared memory of one block at a time. Addresses are offsets.
class SharedMemory {
 public:
  SharedMemory(int64_t bytes, int64_t blocks_of_cluster);
  // A new block begins: its memory is not initialised (it is NaN).
  // `epoch` must exceed all epochs of the blocks before.
  void begin_block(uint32_t epoch);
  void pass_barrier() { ++now; }
  uint32_t epoch() const { return now; }
  const char* check(const Access& access);
  // Nobody may access the destination of an asynchronous copy until it is finished, which writes it.
  const char* begin_copy(const Access& access);
  void finish_copy(const Access& access);
  // fence.proxy.async of a thread of the cluster; of the access, only its time and its thread matter.
  void fence(const Access& access);

  uint8_t* data() { return base; }
  int64_t size() const { return bytes; }
  bool owns(uint64_t address) const {
    const uint64_t begin = reinterpret_cast<uintptr_t>(base);
    return address >= begin && address < begin + bytes;
  }

 private:
  // Who accessed a byte, and when.
  struct Trace {
    int32_t who = -1;
    uint32_t epoch = 0, warp_epoch = 0, arrivals = 0;
  };
  struct Cell {
    Trace writer, reader;
    uint32_t write_fences = 0;  // of the writer before it wrote
    uint32_t copied_in = 0;     // the first epoch of the block that has a copy under way to this byte
  };
  struct Fences {
    uint32_t count = 0, epoch = 0, acquired = 0;  // when the last one was
  };
  bool conflicts(const Trace& other, const Access& access) const;
  void add_reader(Trace& reader, const Access& access) const;
  void set_writer(Cell& cell, const Access& access) const;
  bool is_fenced(const Cell& cell, const Access& access) const;

  const int64_t bytes;
  std::vector<uint8_t> storage;
  uint8_t* base;
  std::vector<Cell> cells;
  std::vector<Fences> fences;  // by the thread's number in the cluster
  uint32_t now = 0, first_epoch = 0;
};

}  // namespace ptx
