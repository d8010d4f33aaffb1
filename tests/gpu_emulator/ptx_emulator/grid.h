// Runs the blocks of a launch, one cluster after another (cluster.h). A launch without clusters has clusters
// of one block.
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
  Size grid, block, cluster;       // the grid counts blocks, and so does the cluster
  int64_t dynamic_shared;          // bytes
  std::vector<uint8_t> arguments;  // laid out as the entry's parameters
};

class Cluster;

constexpr int64_t kMostShared = 227 * 1024;  // bytes per block of an H100

class Block {
 public:
  Block(Device& device, Launch& launch, Cluster& cluster, int rank);
  // Begins a block. `epoch` must exceed all epochs of earlier blocks of the cluster.
  void begin(Size position, int64_t number, uint32_t epoch);
  // Runs until every thread waits for the cluster or has ended.
  void run();
  // When all threads have ended.
  void check_products() const;

  // The state that the warps of the block share.
  Device& device;
  Launch& launch;
  Cluster& cluster;
  const int rank;  // in the cluster
  SharedMemory shared;
  const int64_t dynamic_offset;  // offset of dynamic shared memory
  KernelRecord& record;
  std::unordered_set<uint64_t> loaded_sectors, stored_sectors;  // if traffic is counted
  Size position{};
  std::vector<Warp> warps;
  // A number of a thread that is unique in the launch, and not 0.
  uint32_t number_of(int thread) const {
    return static_cast<uint32_t>(number * launch.block.count() + thread + 1);
  }

 private:
  void check_barrier();

  int64_t number = 0;
};

void run(Device& device, Launch launch);

}  // namespace ptx
