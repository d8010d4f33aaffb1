#include "grid.h"

#include <algorithm>

#include "cluster.h"

namespace ptx {
namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int64_t shared_bytes(const Launch& launch) {
  const int64_t fixed = launch.entry.static_shared;
  return launch.dynamic_shared == 0 ? fixed : round_up(fixed, 16) + launch.dynamic_shared;
}

void check_limits(Device& device, const Launch& launch) {
  const Function& entry = launch.entry;
  const int64_t threads = launch.block.count();
  if (threads < 1 || threads > kMostThreads)
    fail("launch: a block needs 1 to 1024 threads, in " + entry.name);
  if (entry.most_threads > 0 && threads > entry.most_threads)
    device.report("launch: more threads than __launch_bounds__ allows", entry.name);
  if (shared_bytes(launch) > kMostShared)
    device.report("launch: more than 227 KB of shared memory", entry.name);
  const Size &grid = launch.grid, &cluster = launch.cluster;
  if (cluster.count() < 1 || cluster.count() > kMostBlocks)
    fail("launch: a cluster needs 1 to 16 blocks, in " + entry.name);
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0)
    fail("launch: the grid is no multiple of the cluster, in " + entry.name);
}

}  // namespace

Block::Block(Device& device, Launch& launch, Cluster& cluster, int rank)
    : device(device),
      launch(launch),
      cluster(cluster),
      rank(rank),
      shared(shared_bytes(launch), launch.cluster.count()),
      dynamic_offset(round_up(launch.entry.static_shared, 16)),
      record(device.kernels[launch.entry.name]) {}

void Block::begin(Size where, int64_t number_of_block, uint32_t epoch) {
  position = where, number = number_of_block;
  shared.begin_block(epoch);
  const int threads = static_cast<int>(launch.block.count());
  const int count = (threads + kWarp - 1) / kWarp;
  warps.clear();
  warps.reserve(count);
  for (int i = 0; i < count; ++i) {
    // The order of warps must not matter, so every other block takes them backwards.
    const int index = number % 2 != 0 ? count - 1 - i : i;
    warps.emplace_back(*this, index, threads - kWarp * index);
  }
}

void Block::run() {
  const auto waits = [](const Warp& warp) { return !warp.waiting().empty(); };
  const auto waits_for_cluster = [](const Warp& warp) { return !warp.waiting_for_cluster().empty(); };
  while (true) {
    for (Warp& warp : warps) warp.run();
    if (std::none_of(warps.begin(), warps.end(), waits)) return;
    // Threads that wait for the cluster may come to the block's barrier later.
    if (std::any_of(warps.begin(), warps.end(), waits_for_cluster)) return;
    check_barrier();
    shared.pass_barrier();
    for (Warp& warp : warps) warp.pass_barrier();
  }
}

void Block::check_barrier() {
  const Warp* first = nullptr;
  bool same = true, ended = false;
  for (const Warp& warp : warps) {
    ended = ended || warp.has_ended_threads();
    for (const Path& path : warp.waiting()) {
      if (first == nullptr) first = &warp;
      const Operand &one = first->at(first->waiting()[0]).from[0], &other = warp.at(path).from[0];
      if (one.kind != Operand::Kind::immediate || other.kind != one.kind || other.value != one.value)
        fail("barriers of different numbers, which the emulator does not know");
      same = same && path.pc == first->waiting()[0].pc;
    }
  }
  const std::string place = first->place_of(first->at(first->waiting()[0]), 0);
  if (!same) device.report("barrier: threads of a block wait at different barriers", place);
  if (ended) device.report("barrier: some threads of the block have ended", place);
}

// Four warps, from a multiple of four on, are a group, which runs the same products.
void Block::check_products() const {
  for (const Warp& warp : warps) {
    if (warp.product_history() == 0) continue;
    const auto same = [&](const Warp& other) {
      return other.number() / 4 == warp.number() / 4 && other.product_history() == warp.product_history();
    };
    if (std::count_if(warps.begin(), warps.end(), same) != 4)
      device.report("wgmma: the warps of a group run different products", launch.entry.name);
  }
}

void run(Device& device, Launch launch) {
  check_limits(device, launch);
  device.memory.begin_launch();
  KernelRecord& record = device.kernels[launch.entry.name];
  ++record.launches;
  Cluster cluster(device, launch);
  const Size& step = launch.cluster;
  for (int z = 0; z < launch.grid.z; z += step.z)
    for (int y = 0; y < launch.grid.y; y += step.y)
      for (int x = 0; x < launch.grid.x; x += step.x) cluster.run({x, y, z});
  cluster.count_sectors(record);
}

}  // namespace ptx
