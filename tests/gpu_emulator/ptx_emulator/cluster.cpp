#include "cluster.h"

#include <algorithm>
#include <bit>
#include <climits>

namespace ptx {

Cluster::Cluster(Device& device, Launch& launch)
    : device(device), launch(launch), latest(launch.cluster.count()) {
  for (int rank = 0; rank < launch.cluster.count(); ++rank) blocks.emplace_back(device, launch, *this, rank);
}

void Cluster::run(Size first) {
  uint32_t epoch = 0;
  for (const Block& block : blocks) epoch = std::max(epoch, block.shared.epoch() + 1);
  std::fill(latest.begin(), latest.end(), RemoteAccess{});
  relaxed.clear();
  const Size &cluster = launch.cluster, &grid = launch.grid;
  for (Block& block : blocks) {
    const Size at{first.x + block.rank % cluster.x, first.y + block.rank / cluster.x % cluster.y,
                  first.z + block.rank / cluster.x / cluster.y};
    block.begin(at, (static_cast<int64_t>(at.z) * grid.y + at.y) * grid.x + at.x, epoch);
  }
  do {
    for (Block& block : blocks) block.run();
  } while (pass_barrier());
  check_ends();
  for (const Block& block : blocks) block.check_products();
}

// Lets the threads go on that every other thread permits to; returns false if all threads have ended.
bool Cluster::pass_barrier() {
  uint32_t complete = UINT_MAX;
  bool ended = true, passed = false;
  for (const Block& block : blocks)
    for (const Warp& warp : block.warps) {
      complete = std::min(complete, warp.least_arrivals());
      ended = ended && warp.waiting().empty() && warp.waiting_for_cluster().empty();
    }
  if (ended) return false;
  for (Block& block : blocks)
    for (Warp& warp : block.warps) passed = warp.pass_cluster_barrier(complete) || passed;
  if (!passed) fail("cluster barrier: threads wait for others that never arrive, in " + launch.entry.name);
  return true;
}

// A block may end only after a barrier that follows the last access of another block to its memory.
void Cluster::check_ends() {
  for (const Block& block : blocks) {
    const RemoteAccess& access = latest[block.rank];
    uint32_t acquired = 0;
    for (const Warp& warp : block.warps) acquired = std::max(acquired, warp.most_acquired());
    if (access.happened && acquired <= access.arrivals)
      device.report("cluster: a block may end before another block's access to its shared memory",
                    access.place);
  }
}

void Cluster::count_sectors(KernelRecord& record) const {
  std::unordered_set<uint64_t> loaded, stored;
  for (const Block& block : blocks) {
    loaded.insert(block.loaded_sectors.begin(), block.loaded_sectors.end());
    stored.insert(block.stored_sectors.begin(), block.stored_sectors.end());
  }
  record.loaded_sectors += loaded.size(), record.stored_sectors += stored.size();
}

Block* Cluster::owner(uint64_t address) {
  const auto found =
      std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) { return b.shared.owns(address); });
  return found == blocks.end() ? nullptr : &*found;
}

void Cluster::note_access(int owner, uint32_t arrivals, const std::string& place) {
  RemoteAccess& access = latest[owner];
  if (!access.happened || arrivals > access.arrivals) access = {true, arrivals, place};
}

// --- What a warp does at the barrier of its cluster.

void Warp::check_aligned(const Instruction& in, uint32_t active) {
  if (in.aligned && active != live) report("cluster barrier: .aligned, but lanes are missing", in, 0);
}

void Warp::arrive(const Instruction& in, uint32_t active) {
  check_aligned(in, active);
  if (block.device.options.drop_cluster_barriers) return;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((active >> lane & 1) == 0) continue;
    if (arrivals[lane] != waits[lane]) report("cluster barrier: a thread arrives twice", in, lane);
    if (in.relaxed) block.cluster.mark_relaxed(arrivals[lane]);
    ++arrivals[lane];
  }
}

bool Warp::wait_for_cluster(const Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  check_aligned(in, active);
  if (!block.device.options.drop_cluster_barriers) {
    if (frame.caller != nullptr)
      fail("line " + std::to_string(in.line) + ": a barrier in a function that is not inlined");
    for (int lane = 0; lane < kWarp; ++lane)
      if ((active >> lane & 1) != 0 && arrivals[lane] == waits[lane])
        report("cluster barrier: a thread waits before it has arrived", in, lane);
    at_cluster.push_back({path.pc, active});
    path.lanes &= ~active;
  }
  ++path.pc;
  return path.lanes != 0;
}

bool Warp::pass_cluster_barrier(uint32_t complete) {
  const auto may_pass = [&](const Path& path) { return waits[std::countr_zero(path.lanes)] < complete; };
  const auto first = std::stable_partition(at_cluster.begin(), at_cluster.end(),
                                           [&](const Path& path) { return !may_pass(path); });
  const bool passed = first != at_cluster.end();
  for (auto path = first; path != at_cluster.end(); ++path) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((path->lanes >> lane & 1) == 0) continue;
      if (!block.cluster.is_relaxed(waits[lane])) acquired[lane] = waits[lane] + 1;
      ++waits[lane];
    }
    entry.add({path->pc + 1, path->lanes});
  }
  at_cluster.erase(first, at_cluster.end());
  return passed;
}

uint32_t Warp::least_arrivals() const {
  uint32_t least = UINT_MAX;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((live >> lane & 1) != 0) least = std::min(least, arrivals[lane]);
  return least;
}

// --- Addresses.

// mapa, getctarank, and cvta of shared::cluster.
void Warp::map_address(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffers[2], out{};
  const uint64_t* const from = row(frame, in.from[0], buffers[0]);
  const uint64_t* const ranks = in.op == Op::mapa ? row(frame, in.from[1], buffers[1]) : nullptr;
  const bool is_generic = in.op == Op::cvta ? in.to_space : in.space == Space::generic;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((active >> lane & 1) == 0) continue;
    int rank = ClusterAddress(from[lane]).rank_or(block.rank);
    uint64_t offset = ClusterAddress(from[lane]).offset;
    if (is_generic) {
      const Block* const owner = block.cluster.owner(from[lane]);
      if (owner == nullptr) fail("no address of shared memory at " + place_of(in, lane));
      rank = owner->rank;
      offset = from[lane] - reinterpret_cast<uintptr_t>(block.cluster.block(rank).shared.data());
    }
    if (in.op == Op::mapa) rank = static_cast<int>(ranks[lane]);
    if (rank < 0 || rank >= block.cluster.size()) {
      report("cluster: there is no block of this rank", in, lane);
      fail("no block of rank " + std::to_string(rank) + " at " + place_of(in, lane));
    }
    const bool makes_generic = in.op == Op::cvta ? !in.to_space : is_generic;
    out[lane] = makes_generic ? reinterpret_cast<uintptr_t>(block.cluster.block(rank).shared.data()) + offset
                              : ClusterAddress::of(rank, offset);
    if (in.op == Op::getctarank) out[lane] = rank;
  }
  assign(frame, in.to[0], active, out.data());
}

// Blocks of a cluster have equally much shared memory.
void Warp::require_shared(const Instruction& in, int lane, const Access& access, int rank) {
  const bool exists = rank < block.cluster.size();
  if (exists && static_cast<int64_t>(access.address) + access.bytes <= block.shared.size()) return;
  report("shared memory: out of bounds", in, lane);
  fail("shared memory out of bounds at " + place_of(in, lane));
}

uint8_t* Warp::resolve_cluster(const Instruction& in, int lane, const Access& access, int rank) {
  require_shared(in, lane, access, rank);
  SharedMemory& memory = block.cluster.block(rank).shared;
  if (rank != block.rank) {
    if (waits[lane] == 0)
      report("cluster: access to the shared memory of a block that may not have started", in, lane);
    block.cluster.note_access(rank, arrivals[lane], place_of(in, lane));
  }
  const char* const wrong = memory.check(access);
  if (wrong != nullptr) report(wrong, in, lane);
  return memory.data() + access.address;
}

}  // namespace ptx
