// The blocks of a thread-block cluster, which run at the same time: their barrier, and accesses of one block
// to the shared memory of another.
#pragma once

#include <deque>
#include <set>

#include "grid.h"

namespace ptx {

constexpr int kPortableBlocks = 8, kMostBlocks = 16;  // per cluster

// An address in the window of shared memory that the blocks of a cluster share: a block's own addresses mean
// its own memory.
struct ClusterAddress {
  static constexpr int kBits = 24;
  int rank;  // -1: the block's own
  uint64_t offset;

  explicit ClusterAddress(uint64_t address)
      : rank(static_cast<int>(static_cast<uint32_t>(address) >> kBits) - 1),
        offset(address & ((uint64_t{1} << kBits) - 1)) {}
  static uint64_t of(int rank, uint64_t offset) {
    return (static_cast<uint64_t>(rank) + 1) << kBits | offset;
  }
  int rank_or(int own) const { return rank < 0 ? own : rank; }
};

class Cluster {
 public:
  Cluster(Device& device, Launch& launch);
  // Runs the cluster whose first block is at `first`.
  void run(Size first);
  void count_sectors(KernelRecord& record) const;

  Block& block(int rank) { return blocks.at(rank); }
  int size() const { return static_cast<int>(blocks.size()); }
  // The block whose shared memory has a generic address, or null.
  Block* owner(uint64_t address);

  // fence.proxy.async of a thread, which may write to the memory of any block.
  void fence(const Access& access) {
    for (Block& block : blocks) block.shared.fence(access);
  }
  // A phase in which a thread arrived without a release orders no accesses.
  void mark_relaxed(uint32_t phase) { relaxed.insert(phase); }
  bool is_relaxed(uint32_t phase) const { return relaxed.count(phase) != 0; }
  // Notes an access of one block to the shared memory of another, by a thread with so many arrivals.
  void note_access(int owner, uint32_t arrivals, const std::string& place);

 private:
  struct RemoteAccess {
    bool happened = false;
    uint32_t arrivals = 0;
    std::string place;
  };
  bool pass_barrier();
  void check_ends();

  Device& device;
  Launch& launch;
  std::deque<Block> blocks;
  std::vector<RemoteAccess> latest;  // by the rank of the owner
  std::set<uint32_t> relaxed;
};

}  // namespace ptx
