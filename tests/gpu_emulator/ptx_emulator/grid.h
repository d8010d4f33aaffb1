// Runs the blocks of a launch one after another.
#pragma once

#include <unordered_set>
#include <vector>

#include "warp.h"

namespace ptx {

struct Size {
  int x, y, z;
  int64_t count() const { return static_cast<int64_t>(x) * y * z; }
};

struct Launch {
  const Module& module;
  const Function& entry;
  Size grid, block;
  int64_t dynamic_shared;          // bytes
  std::vector<uint8_t> arguments;  // laid out as the entry's parameters
};

constexpr int64_t kMostShared = 227 * 1024;  // bytes per block of an H100

class Block {
 public:
  Block(Device& device, Launch& launch);
  void run(Size position, int64_t number);

  // The state that the warps of the block share.
  Device& device;
  Launch& launch;
  SharedMemory shared;
  const int64_t dynamic_offset;  // offset of dynamic shared memory
  KernelRecord& record;
  std::unordered_set<uint64_t> loaded_sectors, stored_sectors;  // if traffic is counted
  Size position{};
  // A number of a thread that is unique in the launch, and not 0.
  uint32_t number_of(int thread) const {
    return static_cast<uint32_t>(number * launch.block.count() + thread + 1);
  }

 private:
  void check_barrier(const std::vector<Warp>& warps);
  void check_products(const std::vector<Warp>& warps);

  int64_t number = 0;
};

void run(Device& device, Launch launch);

}  // namespace ptx
