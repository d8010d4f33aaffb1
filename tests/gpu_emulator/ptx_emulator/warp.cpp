#include "warp.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cstring>

#include "cluster.h"

namespace ptx {
namespace {

constexpr uint64_t kPoison = 0xdeadbeefdeadbeef;  // value of registers that nothing was written to

int first_lane(uint32_t lanes) { return std::countr_zero(lanes); }

uint64_t load_value(const uint8_t* from, Type type) {
  uint64_t value = 0;
  const int bytes = size_of(type), unused = 64 - 8 * bytes;
  memcpy(&value, from, bytes);
  return is_signed(type) ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value;
}

}  // namespace

// --- Frames.

Frame::Frame(const Function& function, Frame* caller, uint8_t* arguments)
    : function(function),
      caller(caller),
      registers(static_cast<size_t>(function.registers) * kWarp, kPoison),
      locals(function.local_bytes * kWarp, 0xff),
      parameters(arguments),
      parameter_step(0) {
  if (arguments != nullptr) return;
  parameter_step = (function.parameter_bytes + 15) / 16 * 16;
  storage.assign(parameter_step * kWarp, 0xff);
  parameters = storage.data();
}

void Frame::add(Path path) {
  if (path.lanes == 0) return;
  for (Path& other : paths) {
    if (other.pc != path.pc) continue;
    other.lanes |= path.lanes, other.blocked = false;
    return;
  }
  paths.push_back(path);
}

Path Frame::take() {
  const auto sooner = [](const Path& a, const Path& b) {
    return a.blocked != b.blocked ? b.blocked : a.pc < b.pc;
  };
  const auto found = std::min_element(paths.begin(), paths.end(), sooner);
  const Path path = *found;
  paths.erase(found);
  return path;
}

bool Frame::owns(uint64_t address, int bytes) const {
  const auto inside = [&](const uint8_t* begin, uint64_t size) {
    const uint64_t first = reinterpret_cast<uintptr_t>(begin);
    return address >= first && address + bytes <= first + size;
  };
  const uint64_t parameter_size = parameter_step == 0 ? function.parameter_bytes : storage.size();
  return inside(locals.data(), locals.size()) || inside(parameters, parameter_size) ||
         (caller != nullptr && caller->owns(address, bytes));
}

// --- Control.

Warp::Warp(Block& block, int index, int threads)
    : block(block),
      index(index),
      all(threads >= kWarp ? ~uint32_t{0} : (uint32_t{1} << threads) - 1),
      live(all),
      entry(block.launch.entry, nullptr, block.launch.arguments.data()) {
  entry.add({0, all});
  if (entry.function.has_products) products.written.assign(entry.function.registers, true);
}

void Warp::run(Frame& frame) {
  while (!frame.paths.empty()) {
    Path path = frame.take();
    int meeting = INT_MAX;  // where the path may meet another one
    for (const Path& other : frame.paths) meeting = std::min(meeting, other.pc);
    while (step(frame, path)) {
      if (path.pc < meeting) continue;
      frame.add(path);
      break;
    }
  }
}

// Runs one instruction of a path, and returns false if the path ends there.
bool Warp::step(Frame& frame, Path& path) {
  const Instruction& in = frame.function.code[path.pc];
  uint32_t active = path.lanes;
  if (in.predicate >= 0) {
    const uint64_t* const values = &frame.registers[static_cast<size_t>(in.predicate) * kWarp];
    uint32_t truths = 0;
    for (int lane = 0; lane < kWarp; ++lane) truths |= static_cast<uint32_t>(values[lane] & 1) << lane;
    active &= in.predicate_negated ? ~truths : truths;
  }
  block.record.instructions += std::popcount(active);
  if (frame.function.has_products && active != 0) check_registers(in);
  switch (in.op) {
    case Op::bra:
    case Op::call:
    case Op::ret:
    case Op::exit:
    case Op::barrier:
    case Op::shfl:
    case Op::ballot:
    case Op::warp_barrier:
    case Op::ldmatrix:
    case Op::stmatrix:
    case Op::cluster_wait:
    case Op::mma:
    case Op::product:
    case Op::product_fence:
    case Op::commit_products:
    case Op::wait_products:
      if (active != 0) return control(frame, path, in, active);
      break;
    default:
      if (active != 0) execute(frame, in, active);
  }
  ++path.pc;
  return true;
}

bool Warp::control(Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  switch (in.op) {
    case Op::bra:
      return branch(frame, path, in, active);
    case Op::call:
      call(frame, in, active);
      path.lanes &= live;
      ++path.pc;
      return path.lanes != 0;
    case Op::ret:
    case Op::exit:
      return leave(frame, path, in, active);
    case Op::barrier:
      return wait(frame, path, in, active);
    case Op::cluster_wait:
      return wait_for_cluster(frame, path, in, active);
    default:
      return gather(frame, path, in, active);
  }
}

bool Warp::branch(Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  if (active == path.lanes) {
    path.pc = in.target;
    return true;
  }
  frame.add({in.target, active});
  frame.add({path.pc + 1, path.lanes & ~active});
  return false;
}

void Warp::call(Frame& frame, const Instruction& in, uint32_t active) {
  const auto found = block.launch.module.functions.find(in.callee);
  if (found == block.launch.module.functions.end())
    fail("a call of " + in.callee + ", which is not in the module");
  const Function& function = *found->second;
  Frame callee(function, &frame, nullptr);
  Lanes buffer;
  for (size_t i = 0; i < in.from.size(); ++i) {
    const uint64_t* const addresses = row(frame, in.from[i], buffer);
    for_each_lane(active, [&](int lane) {
      memcpy(callee.parameters_of(lane) + function.parameters[i].offset,
             reinterpret_cast<const uint8_t*>(addresses[lane]), function.parameters[i].size);
    });
  }
  callee.add({0, active});
  run(callee);
  for (size_t i = 0; i < in.to.size(); ++i) {
    const uint64_t* const addresses = row(frame, in.to[i], buffer);
    for_each_lane(active & live, [&](int lane) {
      memcpy(reinterpret_cast<uint8_t*>(addresses[lane]),
             callee.parameters_of(lane) + function.results[i].offset, function.results[i].size);
    });
  }
}

bool Warp::leave(const Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  if (in.op == Op::exit || frame.caller == nullptr) live &= ~active;
  path.lanes &= ~active;
  ++path.pc;
  return path.lanes != 0;
}

bool Warp::wait(const Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  if (!block.device.options.drop_barriers) {
    if (frame.caller != nullptr)
      fail("line " + std::to_string(in.line) + ": a barrier in a function that is not inlined");
    at_barrier.push_back({path.pc, active});
    path.lanes &= ~active;
  }
  ++path.pc;
  return path.lanes != 0;
}

void Warp::pass_barrier() {
  for (const Path& path : at_barrier) entry.add({path.pc + 1, path.lanes});
  at_barrier.clear();
}

// Runs an instruction for which the lanes of a mask must come together, or blocks the path until they have.
bool Warp::gather(Frame& frame, Path& path, const Instruction& in, uint32_t active) {
  uint32_t members = all;
  if (in.op == Op::shfl || in.op == Op::ballot || in.op == Op::warp_barrier) {
    Lanes buffer;
    members = static_cast<uint32_t>(row(frame, in.from.back(), buffer)[first_lane(active)]);
  }
  if ((members & live & ~active) != 0) {
    const bool others_run = !path.blocked && !frame.paths.empty();
    if (others_run) {
      frame.add({path.pc, path.lanes, true});
      return false;
    }
    report("warp: lanes that an instruction names do not come to it", in, first_lane(active));
  }
  path.blocked = false;
  ++path.pc;
  switch (in.op) {
    case Op::shfl:
      shuffle(frame, in, active);
      break;
    case Op::ballot:
      ballot(frame, in, active);
      break;
    case Op::ldmatrix:
      load_matrices(frame, in);
      break;
    case Op::stmatrix:
      store_matrices(frame, in);
      break;
    case Op::mma:
      multiply(frame, in);
      break;
    case Op::product:
      begin_product(frame, in);
      break;
    case Op::product_fence:
      products.written.assign(products.written.size(), false);
      break;
    case Op::commit_products:
      products.commit();
      break;
    case Op::wait_products:
      wait_for_products(frame, in);
      break;
    default:  // warp_barrier
      for_each_lane(active, [&](int lane) { ++epochs[lane]; });
  }
  return true;
}

// --- Instructions of lanes by themselves.

void Warp::execute(Frame& frame, const Instruction& in, uint32_t active) {
  switch (in.op) {
    case Op::mov:
      return move(frame, in, active);
    case Op::cvta:
      return convert_address(frame, in, active);
    case Op::ld:
      return load(frame, in, active);
    case Op::st:
      return store(frame, in, active);
    case Op::activemask: {
      Lanes values;
      values.fill(active);
      return assign(frame, in.to[0], active, values.data());
    }
    case Op::copy:
      return copy(frame, in, active);
    case Op::commit_copies:
      return for_each_lane(active, [&](int lane) { copies[lane].commit(); });
    case Op::wait_copies:
      return wait_for_copies(in, active);
    case Op::proxy_fence:
      return for_each_lane(active, [&](int lane) { block.cluster.fence(access_of(lane, 0, 0, nullptr)); });
    case Op::mapa:
    case Op::getctarank:
      return map_address(frame, in, active);
    case Op::cluster_arrive:
      return arrive(in, active);
    case Op::trap:
      report("trap", in, first_lane(active));
      fail("trap at " + place_of(in, first_lane(active)));
    case Op::nop:
      return;
    default:
      return compute_lanes(frame, in, active);
  }
}

void Warp::compute_lanes(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffers[4], out, second;
  const uint64_t* from[4] = {};
  for (size_t i = 0; i < in.from.size(); ++i) from[i] = row(frame, in.from[i], buffers[i]);
  compute(in, from, out, second);
  assign(frame, in.to[0], active, out.data());
  if (in.to.size() > 1) assign(frame, in.to[1], active, second.data());
}

// One register to another, several into a wider one, or a wide one into several.
void Warp::move(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffer, out;
  const int pieces = static_cast<int>(std::max(in.from.size(), in.to.size()));
  const int bits = 8 * size_of(in.type) / pieces;
  const uint64_t mask = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  if (in.to.size() == 1) {
    out.fill(0);
    for (size_t i = 0; i < in.from.size(); ++i) {
      const uint64_t* const piece = row(frame, in.from[i], buffer);
      for (int lane = 0; lane < kWarp; ++lane) out[lane] |= (piece[lane] & mask) << i * bits;
    }
    return assign(frame, in.to[0], active, out.data());
  }
  Lanes whole;
  memcpy(whole.data(), row(frame, in.from[0], buffer), sizeof(whole));  // may be one of the results
  for (size_t i = 0; i < in.to.size(); ++i) {
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = whole[lane] >> i * bits & mask;
    assign(frame, in.to[i], active, out.data());
  }
}

void Warp::convert_address(Frame& frame, const Instruction& in, uint32_t active) {
  if (in.space == Space::shared_cluster) return map_address(frame, in, active);
  Lanes buffer, out;
  const uint64_t* const from = row(frame, in.from[0], buffer);
  const uint64_t base = in.space == Space::shared ? reinterpret_cast<uintptr_t>(block.shared.data()) : 0;
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = in.to_space ? from[lane] - base : from[lane] + base;
  assign(frame, in.to[0], active, out.data());
}

void Warp::load(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffer, addresses;
  const uint64_t* const base = row(frame, in.from[0], buffer);
  for (int lane = 0; lane < kWarp; ++lane) addresses[lane] = base[lane] + in.offset;
  const int count = static_cast<int>(in.to.size()), size = size_of(in.type);
  for_each_lane(active, [&](int lane) {
    const uint8_t* const from = resolve(frame, in, lane, addresses[lane], count * size, nullptr);
    for (int i = 0; i < count; ++i)
      if (in.to[i].kind == Operand::Kind::reg)
        frame.registers[static_cast<size_t>(in.to[i].index) * kWarp + lane] =
            load_value(from + i * size, in.type);
  });
  count_request(in.space, true, active, addresses, count * size);
}

void Warp::store(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffers[17], addresses;
  const uint64_t* values[17];
  for (size_t i = 0; i < in.from.size(); ++i) values[i] = row(frame, in.from[i], buffers[i]);
  for (int lane = 0; lane < kWarp; ++lane) addresses[lane] = values[0][lane] + in.offset;
  const int count = static_cast<int>(in.from.size()) - 1, size = size_of(in.type);
  for_each_lane(active, [&](int lane) {
    uint8_t data[128];
    for (int i = 0; i < count; ++i) memcpy(data + i * size, &values[i + 1][lane], size);
    memcpy(resolve(frame, in, lane, addresses[lane], count * size, data), data, count * size);
  });
  count_request(in.space, false, active, addresses, count * size);
}

// --- Instructions of lanes together.

void Warp::shuffle(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffers[3], source, out, valid;
  memcpy(source.data(), row(frame, in.from[0], buffers[0]), sizeof(source));
  const uint64_t* const by = row(frame, in.from[1], buffers[1]);
  const uint64_t* const control = row(frame, in.from[2], buffers[2]);
  for_each_lane(active, [&](int lane) {
    // PTX's description of shfl.sync: a segment mask in bits 8 to 12 and a clamp in bits 0 to 4.
    const int segment = static_cast<int>(control[lane] >> 8 & 31),
              clamp = static_cast<int>(control[lane] & 31);
    const int step = static_cast<int>(by[lane] & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = lane;
    switch (in.shuffle) {
      case Shuffle::bfly:
        from = lane ^ step;
        break;
      case Shuffle::idx:
        from = first | (step & ~segment);
        break;
      case Shuffle::up:
        from = lane - step;
        break;
      case Shuffle::down:
        from = lane + step;
        break;
    }
    valid[lane] = in.shuffle == Shuffle::up ? from >= last : from <= last;
    if (valid[lane] == 0) from = lane;
    if ((active >> from & 1) == 0) report("warp: a shuffle reads a lane that is not there", in, lane);
    out[lane] = source[from];
  });
  assign(frame, in.to[0], active, out.data());
  if (in.to.size() > 1) assign(frame, in.to[1], active, valid.data());
}

void Warp::ballot(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffer, out;
  const uint64_t* const values = row(frame, in.from[0], buffer);
  uint32_t truths = 0;
  for_each_lane(active, [&](int lane) { truths |= static_cast<uint32_t>(values[lane] & 1) << lane; });
  out.fill(truths);
  assign(frame, in.to[0], active, out.data());
}

// Matrices of 8 x 8 elements of 16 bits. Lane 8 m + r has the address of row r of matrix m. Lane l holds
// elements 2 (l % 4) and the next one of row l / 4, or of column l / 4 if the matrix is transposed.
struct MatrixPlace {
  int first, second;  // indices of a lane's elements
  MatrixPlace(int lane, bool transposed)
      : first(transposed ? 16 * (lane % 4) + lane / 4 : 8 * (lane / 4) + 2 * (lane % 4)),
        second(first + (transposed ? 8 : 1)) {}
};

void Warp::load_matrices(Frame& frame, const Instruction& in) {
  Lanes buffer, addresses, out;
  const uint64_t* const base = row(frame, in.from[0], buffer);
  for (int lane = 0; lane < kWarp; ++lane) addresses[lane] = base[lane] + in.offset;
  for (size_t m = 0; m < in.to.size(); ++m) {
    uint16_t matrix[64];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * static_cast<int>(m) + r;
      memcpy(matrix + 8 * r, resolve(frame, in, lane, addresses[lane], 16, nullptr), 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const MatrixPlace place(lane, in.transposed);
      out[lane] = static_cast<uint32_t>(matrix[place.second]) << 16 | matrix[place.first];
    }
    assign(frame, in.to[m], all, out.data());
  }
}

void Warp::store_matrices(Frame& frame, const Instruction& in) {
  Lanes buffer, addresses;
  const uint64_t* const base = row(frame, in.from[0], buffer);
  for (int lane = 0; lane < kWarp; ++lane) addresses[lane] = base[lane] + in.offset;
  for (size_t m = 0; m + 1 < in.from.size(); ++m) {
    const uint64_t* const values = row(frame, in.from[m + 1], buffer);
    uint16_t matrix[64];
    for (int lane = 0; lane < kWarp; ++lane) {
      const MatrixPlace place(lane, in.transposed);
      matrix[place.first] = static_cast<uint16_t>(values[lane]);
      matrix[place.second] = static_cast<uint16_t>(values[lane] >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * static_cast<int>(m) + r;
      const uint8_t* const data = reinterpret_cast<const uint8_t*>(matrix + 8 * r);
      memcpy(resolve(frame, in, lane, addresses[lane], 16, data), data, 16);
    }
  }
}

// --- Operands.

uint64_t Warp::special(Special which, int lane) const {
  const Size &grid = block.launch.grid, &threads = block.launch.block, &cluster = block.launch.cluster,
             &at = block.position;
  const int thread = kWarp * index + lane;
  switch (which) {
    case Special::tid_x:
      return thread % threads.x;
    case Special::tid_y:
      return thread / threads.x % threads.y;
    case Special::tid_z:
      return thread / threads.x / threads.y;
    case Special::ntid_x:
      return threads.x;
    case Special::ntid_y:
      return threads.y;
    case Special::ntid_z:
      return threads.z;
    case Special::ctaid_x:
      return at.x;
    case Special::ctaid_y:
      return at.y;
    case Special::ctaid_z:
      return at.z;
    case Special::nctaid_x:
      return grid.x;
    case Special::nctaid_y:
      return grid.y;
    case Special::nctaid_z:
      return grid.z;
    case Special::laneid:
      return lane;
    case Special::warpid:
      return index;
    case Special::cluster_ctaid_x:
      return at.x % cluster.x;
    case Special::cluster_ctaid_y:
      return at.y % cluster.y;
    case Special::cluster_ctaid_z:
      return at.z % cluster.z;
    case Special::cluster_nctaid_x:
      return cluster.x;
    case Special::cluster_nctaid_y:
      return cluster.y;
    case Special::cluster_nctaid_z:
      return cluster.z;
    case Special::clusterid_x:
      return at.x / cluster.x;
    case Special::clusterid_y:
      return at.y / cluster.y;
    case Special::clusterid_z:
      return at.z / cluster.z;
    case Special::nclusterid_x:
      return grid.x / cluster.x;
    case Special::nclusterid_y:
      return grid.y / cluster.y;
    case Special::nclusterid_z:
      return grid.z / cluster.z;
    case Special::cluster_ctarank:
      return block.rank;
    case Special::cluster_nctarank:
      return cluster.count();
  }
  return 0;
}

// The values of an operand in all lanes. `buffer` holds them if they are not those of a register.
const uint64_t* Warp::row(Frame& frame, const Operand& operand, Lanes& buffer) {
  const auto fill = [&](auto value) {
    for (int lane = 0; lane < kWarp; ++lane) buffer[lane] = value(lane);
    return buffer.data();
  };
  switch (operand.kind) {
    case Operand::Kind::reg: {
      const uint64_t* const values = &frame.registers[static_cast<size_t>(operand.index) * kWarp];
      if (!operand.negated) return values;
      return fill([&](int lane) { return values[lane] ^ 1; });
    }
    case Operand::Kind::immediate:
    case Operand::Kind::shared:
      buffer.fill(operand.value);
      return buffer.data();
    case Operand::Kind::dynamic_shared:
      buffer.fill(block.dynamic_offset + operand.value);
      return buffer.data();
    case Operand::Kind::special:
      return fill([&](int lane) { return special(static_cast<Special>(operand.index), lane); });
    case Operand::Kind::parameter:
      return fill(
          [&](int lane) { return reinterpret_cast<uintptr_t>(frame.parameters_of(lane)) + operand.value; });
    case Operand::Kind::local:
      return fill(
          [&](int lane) { return reinterpret_cast<uintptr_t>(frame.locals_of(lane)) + operand.value; });
    case Operand::Kind::none:
      break;
  }
  fail("an operand that has no value");
}

void Warp::assign(Frame& frame, const Operand& to, uint32_t active, const uint64_t* values) {
  if (to.kind != Operand::Kind::reg) return;  // "_"
  uint64_t* const out = &frame.registers[static_cast<size_t>(to.index) * kWarp];
  if (active == ~uint32_t{0})
    memcpy(out, values, sizeof(Lanes));
  else
    for_each_lane(active, [&](int lane) { out[lane] = values[lane]; });
}

// --- Memory.

Access Warp::access_of(int lane, uint64_t address, int bytes, const uint8_t* written, bool read_only) const {
  return {address,
          bytes,
          written,
          read_only,
          kWarp * index + lane,
          epochs[lane],
          block.rank,
          block.shared.epoch(),
          arrivals[lane],
          acquired[lane]};
}

// Checks an access and returns where it is.
uint8_t* Warp::resolve(Frame& frame, const Instruction& in, int lane, uint64_t address, int bytes,
                       const uint8_t* written) {
  if (address % bytes != 0) report("misaligned access", in, lane);
  uint8_t* const pointer = reinterpret_cast<uint8_t*>(address);
  Access access = access_of(lane, address, bytes, written, in.read_only);
  switch (in.op == Op::ldmatrix || in.op == Op::stmatrix ? Space::shared : in.space) {
    case Space::shared:
      access.address = static_cast<uint32_t>(address);
      return resolve_shared(in, lane, access);
    case Space::shared_cluster:
      access.address = ClusterAddress(address).offset;
      return resolve_cluster(in, lane, access, ClusterAddress(address).rank_or(block.rank));
    case Space::global:
      return resolve_global(in, lane, access);
    case Space::constant:
      return pointer;
    case Space::local:
    case Space::parameter:
      if (frame.owns(address, bytes)) return pointer;
      report("local memory: out of bounds", in, lane);
      fail("local memory out of bounds at " + place_of(in, lane));
    case Space::generic:
      break;
  }
  if (block.device.memory.contains(access)) return resolve_global(in, lane, access);
  if (Block* const owner = block.cluster.owner(address)) {
    access.address = address - reinterpret_cast<uintptr_t>(owner->shared.data());
    return resolve_cluster(in, lane, access, owner->rank);
  }
  return frame.owns(address, bytes) ? pointer : resolve_global(in, lane, access);
}

uint8_t* Warp::resolve_shared(const Instruction& in, int lane, const Access& access) {
  return resolve_cluster(in, lane, access, block.rank);
}

uint8_t* Warp::resolve_global(const Instruction& in, int lane, const Access& access) {
  uint8_t* const pointer = reinterpret_cast<uint8_t*>(access.address);
  const bool allowed = block.device.memory.contains(access);
  if (!allowed && access.written == nullptr) {
    for (const auto& [name, data] : block.launch.module.constants)
      if (pointer >= data.data() && pointer + access.bytes <= data.data() + data.size()) return pointer;
  }
  const char* const wrong = block.device.memory.check(access, block.number_of(access.thread));
  if (wrong != nullptr) report(wrong, in, lane);
  if (!allowed) fail(std::string(wrong) + " at " + place_of(in, lane));
  return pointer;
}

void Warp::count_request(Space space, bool is_load, uint32_t active, const Lanes& addresses, int bytes) {
  if (!block.device.options.count_traffic || (space != Space::global && space != Space::generic)) return;
  uint32_t lanes = 0;  // those that access global memory
  for_each_lane(active, [&](int lane) {
    const bool is_global = block.device.memory.contains(access_of(lane, addresses[lane], bytes, nullptr));
    if (space == Space::global || is_global) lanes |= 1u << lane;
  });
  if (lanes == 0) return;
  std::vector<uint64_t> sectors;
  for_each_lane(lanes, [&](int lane) {
    const uint64_t last = (addresses[lane] + bytes - 1) / 32;
    for (uint64_t sector = addresses[lane] / 32; sector <= last; ++sector) sectors.push_back(sector);
    if (is_load) block.record.most_loads = std::max(block.record.most_loads, ++loads[lane]);
  });
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  (is_load ? block.loaded_sectors : block.stored_sectors).insert(sectors.begin(), sectors.end());
  Traffic& traffic = block.record.traffic[(is_load ? "load " : "store ") + std::to_string(bytes)];
  traffic.requests += 1, traffic.bytes += static_cast<uint64_t>(std::popcount(lanes)) * bytes;
  traffic.sectors += sectors.size();
  for (size_t i = 0; i < sectors.size(); ++i) traffic.lines += i == 0 || sectors[i] / 4 != sectors[i - 1] / 4;
}

// --- Messages.

std::string Warp::place_of(const Instruction& in, int lane) const {
  const Size& at = block.position;
  return block.launch.entry.name + ", line " + std::to_string(in.line) + ", block " + std::to_string(at.x) +
         "," + std::to_string(at.y) + "," + std::to_string(at.z) + ", thread " +
         std::to_string(kWarp * index + lane);
}

void Warp::report(const char* what, const Instruction& in, int lane) {
  block.device.report(what, place_of(in, lane));
}

}  // namespace ptx
