// The state that outlives a launch: options, memory, and what was seen.
#pragma once

#include <map>
#include <string>

#include "memory.h"

namespace ptx {

struct Options {
  bool drop_barriers = false;  // bar.sync does nothing; a negative control of the checks
  bool count_traffic = false;
  bool drop_cluster_barriers = false;  // barrier.cluster does nothing; another negative control
};

// The requests of warps of one kernel that have one direction and one width per thread. Global memory moves
// sectors of 32 bytes, and a request takes a cycle per line of 128 bytes.
struct Traffic {
  uint64_t requests = 0, bytes = 0, sectors = 0, lines = 0;
};

struct Problem {
  uint64_t count = 0;
  std::string first;  // where it was seen first
};

struct KernelRecord {
  uint64_t launches = 0, instructions = 0;          // instructions of threads
  uint64_t loaded_sectors = 0, stored_sectors = 0;  // distinct ones of each launch
  uint64_t most_loads = 0;                          // of a thread
  std::map<std::string, Traffic> traffic;           // by "load 16", "store 4"
};

struct Device {
  Options options;
  GlobalMemory memory;
  std::map<std::string, Problem> problems;
  std::map<std::string, KernelRecord> kernels;

  void report(const std::string& what, const std::string& where) {
    Problem& problem = problems[what];
    if (++problem.count == 1) problem.first = where;
  }
};

}  // namespace ptx
