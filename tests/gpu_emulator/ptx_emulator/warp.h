// Runs the threads of one warp in lock step.
//
// Lanes that stand at the same instruction form a path. The lowest path runs first, so that lanes that
// diverged meet again as early as they can. Checks do not depend on this order.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "arithmetic.h"
#include "asynchronous.h"
#include "device.h"

namespace ptx {

class Block;

template <class F>
void for_each_lane(uint32_t lanes, const F& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

struct Path {
  int pc;
  uint32_t lanes;        // a bit per lane
  bool blocked = false;  // waits for other lanes of its warp
};

// A call of a function by some lanes of a warp.
struct Frame {
  const Function& function;
  Frame* caller;
  std::vector<uint64_t> registers;  // 32 lanes per register
  std::vector<uint8_t> locals;      // local_bytes per lane
  std::vector<uint8_t> storage;     // the parameters of a function that is not an entry, per lane
  uint8_t* parameters;
  int64_t parameter_step;  // from lane to lane; 0 for an entry, whose parameters are common
  std::vector<Path> paths;

  Frame(const Function& function, Frame* caller, uint8_t* arguments);
  uint8_t* parameters_of(int lane) { return parameters + lane * parameter_step; }
  uint8_t* locals_of(int lane) { return locals.data() + lane * function.local_bytes; }
  void add(Path path);
  Path take();  // the lowest path that is not blocked
  // Whether an address is in the parameters or in the local memory of this call or of one of its callers.
  bool owns(uint64_t address, int bytes) const;
};

class Warp {
 public:
  Warp(Block& block, int index, int threads);
  // Runs until every thread waits at a barrier or has ended.
  void run() { run(entry); }
  void pass_barrier();
  const std::vector<Path>& waiting() const { return at_barrier; }
  // --- The barrier of the cluster (cluster.cpp).
  const std::vector<Path>& waiting_for_cluster() const { return at_cluster; }
  // Lets the threads go on that wait for one of the first `complete` phases; returns whether there are some.
  bool pass_cluster_barrier(uint32_t complete);
  // The least number of arrivals of a thread that has not ended, and the most phases that a thread acquired.
  uint32_t least_arrivals() const;
  uint32_t most_acquired() const { return *std::max_element(acquired.begin(), acquired.end()); }
  bool has_ended_threads() const { return live != all; }
  int number() const { return index; }
  // Depends on the matrix products so far, which must be the same in the four warps of a group.
  uint64_t product_history() const { return products.history; }
  const Instruction& at(const Path& path) const { return entry.function.code[path.pc]; }
  std::string place_of(const Instruction& in, int lane) const;  // for messages

 private:
  void run(Frame& frame);
  bool step(Frame& frame, Path& path);
  void execute(Frame& frame, const Instruction& in, uint32_t active);
  bool control(Frame& frame, Path& path, const Instruction& in, uint32_t active);
  bool branch(Frame& frame, Path& path, const Instruction& in, uint32_t active);
  void call(Frame& frame, const Instruction& in, uint32_t active);
  bool leave(const Frame& frame, Path& path, const Instruction& in, uint32_t active);
  bool wait(const Frame& frame, Path& path, const Instruction& in, uint32_t active);
  bool gather(Frame& frame, Path& path, const Instruction& in, uint32_t active);
  bool wait_for_cluster(const Frame& frame, Path& path, const Instruction& in, uint32_t active);
  void arrive(const Instruction& in, uint32_t active);
  void map_address(Frame& frame, const Instruction& in, uint32_t active);

  void compute_lanes(Frame& frame, const Instruction& in, uint32_t active);
  void move(Frame& frame, const Instruction& in, uint32_t active);
  void convert_address(Frame& frame, const Instruction& in, uint32_t active);
  void load(Frame& frame, const Instruction& in, uint32_t active);
  void store(Frame& frame, const Instruction& in, uint32_t active);
  void shuffle(Frame& frame, const Instruction& in, uint32_t active);
  void ballot(Frame& frame, const Instruction& in, uint32_t active);
  void load_matrices(Frame& frame, const Instruction& in);
  void store_matrices(Frame& frame, const Instruction& in);

  // In asynchronous.cpp.
  void copy(Frame& frame, const Instruction& in, uint32_t active);
  void wait_for_copies(const Instruction& in, uint32_t active);
  void multiply(Frame& frame, const Instruction& in);
  void begin_product(Frame& frame, const Instruction& in);
  void wait_for_products(Frame& frame, const Instruction& in);
  std::vector<uint8_t> load_factor(const Instruction& in, const Factor& factor);
  void check_registers(const Instruction& in);

  const uint64_t* row(Frame& frame, const Operand& operand, Lanes& buffer);
  void assign(Frame& frame, const Operand& to, uint32_t active, const uint64_t* values);
  uint64_t special(Special which, int lane) const;
  // An access of a lane now.
  Access access_of(int lane, uint64_t address, int bytes, const uint8_t* written,
                   bool read_only = false) const;
  uint8_t* resolve(Frame& frame, const Instruction& in, int lane, uint64_t address, int bytes,
                   const uint8_t* written);
  void require_shared(const Instruction& in, int lane, const Access& access, int rank);
  uint8_t* resolve_shared(const Instruction& in, int lane, const Access& access);
  uint8_t* resolve_cluster(const Instruction& in, int lane, const Access& access, int rank);
  void check_aligned(const Instruction& in, uint32_t active);
  uint8_t* resolve_global(const Instruction& in, int lane, const Access& access);
  void count_request(Space space, bool is_load, uint32_t active, const Lanes& addresses, int bytes);
  void report(const char* what, const Instruction& in, int lane);

  Block& block;
  const int index;
  const uint32_t all;  // the lanes that have a thread
  uint32_t live;       // lanes that have not ended
  std::array<uint32_t, kWarp> epochs{};
  // By lane: arrivals and waits at the cluster's barrier, and the phases that the waits acquired.
  std::array<uint32_t, kWarp> arrivals{}, waits{}, acquired{};
  std::array<uint64_t, kWarp> loads{};  // from global memory, if traffic is counted
  std::vector<Path> at_barrier, at_cluster;
  Frame entry;
  std::array<Groups<Copy>, kWarp> copies;
  Products products;
};

}  // namespace ptx
