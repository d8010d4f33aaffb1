// Global and shared memory with the checks of every access: bounds, alignment, races, initialisation.
//
// A check returns what is wrong, or null. It follows the happens-before relation, not the order in which the
// emulator happens to run threads: two threads of a block are ordered by a barrier only, and two blocks by
// nothing. For each byte it remembers the last writer and the last readers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

struct Access {
  uint64_t address;
  int bytes;
  const uint8_t* written;       // null for a load
  bool read_only;               // ld.global.nc, whose cache does not see stores of the same launch
  int thread;                   // within the block
  uint32_t warp_epoch;          // number of barriers of its warp so far
  bool by_tensor_core = false;  // through the asynchronous proxy, which sees writes only after a fence
};

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
  SharedMemory(int64_t bytes, int64_t threads);
  // A new block begins: its memory is not initialised (it is NaN).
  void begin_block();
  void pass_barrier() { ++epoch; }
  const char* check(const Access& access);
  // Nobody may access the destination of an asynchronous copy until it is finished, which writes it.
  const char* begin_copy(const Access& access);
  void finish_copy(const Access& access);
  // fence.proxy.async of a thread.
  void fence(int thread) { fences[thread] = {fences[thread].count + 1, epoch}; }

  uint8_t* data() { return base; }
  int64_t size() const { return bytes; }
  bool owns(uint64_t address) const {
    const uint64_t begin = reinterpret_cast<uintptr_t>(base);
    return address >= begin && address < begin + bytes;
  }

 private:
  struct Cell {
    int32_t writer = -1, reader = -1;
    uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
    uint32_t write_fences = 0;  // of the writer before it wrote
    uint32_t copied_in = 0;     // the first epoch of the block that has a copy under way to this byte
  };
  struct Fences {
    uint32_t count = 0, epoch = 0;  // when the last one was
  };
  bool conflicts(int32_t other, uint32_t other_epoch, uint32_t other_warp_epoch, const Access& access) const;
  void add_reader(Cell& cell, const Access& access) const;
  void set_writer(Cell& cell, const Access& access) const;
  bool is_fenced(const Cell& cell, const Access& access) const;

  const int64_t bytes;
  std::vector<uint8_t> storage;
  uint8_t* base;
  std::vector<Cell> cells;
  std::vector<Fences> fences;  // by thread
  uint32_t epoch = 0, first_epoch = 0;
};

}  // namespace ptx
