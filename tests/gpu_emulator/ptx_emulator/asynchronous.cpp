#include "asynchronous.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "grid.h"

namespace ptx {
namespace {

using Matrix = std::vector<std::array<double, kDepth>>;  // rows of A, or columns of B

// The registers of a product's left factor, which is in shared memory if there are none.
std::vector<Operand> fragments_of(const Instruction& in) {
  return in.from.size() == 3 ? std::vector<Operand>{}
                             : std::vector<Operand>(in.from.begin(), in.from.begin() + 4);
}

bool contains(const std::vector<Operand>& operands, int reg) {
  return std::any_of(operands.begin(), operands.end(),
                     [&](const Operand& o) { return o.kind == Operand::Kind::reg && o.index == reg; });
}

// The elements of chunks of 16 bytes that load_factor returns.
Matrix elements(const std::vector<uint8_t>& bytes, const Factor& factor, Type type) {
  Matrix out(factor.count);
  for (int across = 0; across < factor.count; ++across)
    for (int along = 0; along < kDepth; ++along) {
      const int place = factor.matrix.transposed ? along * factor.count + across : across * kDepth + along;
      uint16_t bits;
      memcpy(&bits, &bytes[2 * place], 2);
      out[across][along] = number_of(bits, type);
    }
  return out;
}

// The elements of fragments, each register of which holds two that are adjacent along the depth.
template <class F>
Matrix elements(const uint64_t* const* registers, int count, int rows, Type type, const F& element_of) {
  Matrix out(rows);
  for (int reg = 0; reg < count; ++reg)
    for (int lane = 0; lane < kWarp; ++lane) {
      const Element e = element_of(lane, reg);
      for (int i = 0; i < 2; ++i)
        out[e.across][e.along + i] = number_of(registers[reg][lane] >> 16 * i & 0xffff, type);
    }
  return out;
}

// Adds a x b to the accumulators of a warp.
void add_product(const Matrix& a, const Matrix& b, std::vector<Lanes>& sums) {
  for (size_t reg = 0; reg < sums.size(); ++reg)
    for (int lane = 0; lane < kWarp; ++lane) {
      const Element e = element_of_d(lane, static_cast<int>(reg));
      const float sum = std::bit_cast<float>(static_cast<uint32_t>(sums[reg][lane]));
      const float result = multiply_add(sum, a[e.across].data(), b[e.along].data());
      sums[reg][lane] = std::bit_cast<uint32_t>(result);
    }
}

}  // namespace

// --- Copies.

void Warp::copy(Frame& frame, const Instruction& in, uint32_t active) {
  Lanes buffers[3];
  const uint64_t* const to = row(frame, in.from[0], buffers[0]);
  const uint64_t* const from = row(frame, in.from[1], buffers[1]);
  const int bytes = static_cast<int>(in.from[2].value);
  const uint64_t* const filled = row(frame, in.from.back(), buffers[2]);
  uint32_t reading = 0;
  Lanes addresses;
  for_each_lane(active, [&](int lane) {
    Copy copy{static_cast<uint32_t>(to[lane] + in.offset), bytes, {}};
    const int count = static_cast<int>(std::min<uint64_t>(static_cast<uint32_t>(filled[lane]), bytes));
    addresses[lane] = from[lane] + in.source_offset;
    if (copy.address % bytes != 0 || (count > 0 && addresses[lane] % bytes != 0))
      report("misaligned access", in, lane);
    if (count > 0) {
      const Access source = access_of(lane, addresses[lane], count, nullptr);
      memcpy(copy.data.data(), resolve_global(in, lane, source), count);
      reading |= uint32_t{1} << lane;
    }
    const Access access = access_of(lane, copy.address, bytes, copy.data.data());
    require_shared(in, lane, access, block.rank);
    const char* const wrong = block.shared.begin_copy(access);
    if (wrong != nullptr) report(wrong, in, lane);
    copies[lane].open.push_back(copy);
  });
  if (reading != 0) count_request(Space::global, true, reading, addresses, bytes);
}

void Warp::wait_for_copies(const Instruction& in, uint32_t active) {
  const bool all_of_them = in.from.empty();
  const uint64_t most = all_of_them ? 0 : in.from[0].value;
  for_each_lane(active, [&](int lane) {
    if (all_of_them) copies[lane].commit();
    for (std::vector<Copy> group; copies[lane].take(most, group);)
      for (const Copy& copy : group)
        block.shared.finish_copy(access_of(lane, copy.address, copy.bytes, copy.data.data()));
  });
}

// --- Products of matrices.

void Warp::multiply(Frame& frame, const Instruction& in) {
  Lanes buffers[10];
  const uint64_t* from[10];
  for (int i = 0; i < 10; ++i) from[i] = row(frame, in.from[i], buffers[i]);
  std::vector<Lanes> sums(4);
  for (int i = 0; i < 4; ++i) memcpy(sums[i].data(), from[6 + i], sizeof(Lanes));
  add_product(elements(from, 4, kRows, in.source_type, element_of_a),
              elements(from + 4, 2, 8, in.source_type, element_of_b), sums);
  for (int i = 0; i < 4; ++i) assign(frame, in.to[i], all, sums[i].data());
}

// The four warps of a group share no registers: each multiplies 16 of the 64 rows of A.
void Warp::begin_product(Frame& frame, const Instruction& in) {
  const std::vector<Operand> fragments = fragments_of(in);
  const auto is_written = [&](const Operand& o) { return products.written[o.index]; };
  const auto is_result = [&](const Operand& o) { return products.results.count(o.index) != 0; };
  if (std::any_of(in.to.begin(), in.to.end(), is_written) ||
      std::any_of(fragments.begin(), fragments.end(), is_written))
    report("wgmma: a register was written after the last wgmma.fence", in, 0);
  if (std::any_of(fragments.begin(), fragments.end(), is_result))
    report("wgmma: use of a register before the wait for the product that writes it", in, 0);

  Product product{&in, {}, {}};
  const int columns = 2 * static_cast<int>(in.to.size());
  const auto load = [&](const Operand& descriptor, bool transposed, int first, int count) {
    Lanes buffer;
    const uint64_t* const values = row(frame, descriptor, buffer);
    if (std::any_of(values, values + kWarp, [&](uint64_t value) { return value != values[0]; }))
      report("wgmma: the lanes of a warp have different descriptors", in, 0);
    const Factor factor{SharedMatrix(values[0], transposed), first, count};
    product.factors.push_back(factor);
    product.loaded.push_back(load_factor(in, factor));
    return elements(product.loaded.back(), factor, in.source_type);
  };
  Matrix a;
  if (fragments.empty()) {
    a = load(in.from[0], in.left_transposed, kRows * (index % 4), kRows);
  } else {
    Lanes buffers[4];
    const uint64_t* from[4];
    for (int i = 0; i < 4; ++i) from[i] = row(frame, fragments[i], buffers[i]);
    a = elements(from, 4, kRows, in.source_type, element_of_a);
  }
  const Matrix b = load(in.from[in.from.size() - 2], in.transposed, 0, columns);

  Lanes buffer;
  const bool adds = (row(frame, in.from.back(), buffer)[0] & 1) != 0;
  std::vector<Lanes> sums(in.to.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    const auto before = products.results.find(in.to[i].index);
    if (!adds)
      sums[i].fill(0);
    else if (before != products.results.end())
      sums[i] = before->second;
    else
      memcpy(sums[i].data(), row(frame, in.to[i], buffer), sizeof(Lanes));
  }
  add_product(a, b, sums);
  buffer.fill(0xffffffff);  // NaN
  for (size_t i = 0; i < sums.size(); ++i) {
    products.results[in.to[i].index] = sums[i];
    assign(frame, in.to[i], all, buffer.data());
  }
  products.open.push_back(std::move(product));
  products.history = 31 * products.history + in.line;
}

// Reads a factor in chunks of 16 bytes: by rows of A or columns of B, or along the depth if it is transposed.
std::vector<uint8_t> Warp::load_factor(const Instruction& in, const Factor& factor) {
  std::vector<uint8_t> out;
  const auto load = [&](int across, int along) {
    Access access = access_of(0, factor.matrix.chunk(factor.first + across, along), 16, nullptr);
    access.by_tensor_core = true;
    const uint8_t* const from = resolve_shared(in, 0, access);
    out.insert(out.end(), from, from + 16);
  };
  if (factor.matrix.transposed) {
    for (int along = 0; along < kDepth; ++along)
      for (int across = 0; across < factor.count; across += 8) load(across, along);
  } else {
    for (int across = 0; across < factor.count; ++across)
      for (int along = 0; along < kDepth; along += 8) load(across, along);
  }
  return out;
}

void Warp::wait_for_products(Frame& frame, const Instruction& in) {
  for (std::vector<Product> group; products.take(in.from[0].value, group);) {
    // Whoever writes a factor until now may be seen by the product.
    for (const Product& product : group)
      for (size_t i = 0; i < product.factors.size(); ++i)
        if (load_factor(*product.in, product.factors[i]) != product.loaded[i])
          report("wgmma: shared memory was written before the wait for the product that reads it",
                 *product.in, 0);
    const auto under_way = [&](int reg) {
      const auto writes = [&](const Product& product) { return contains(product.in->to, reg); };
      return std::any_of(products.open.begin(), products.open.end(), writes) ||
             std::any_of(products.committed.begin(), products.committed.end(),
                         [&](const auto& g) { return std::any_of(g.begin(), g.end(), writes); });
    };
    for (const Product& product : group)
      for (const Operand& o : product.in->to) {
        const auto result = products.results.find(o.index);
        if (result == products.results.end() || under_way(o.index)) continue;
        assign(frame, o, all, result->second.data());
        products.results.erase(result);
      }
  }
  for (uint32_t& epoch : epochs) ++epoch;  // The lanes have waited together.
}

// Checks the registers of an instruction that runs beside products, and notes what it writes.
void Warp::check_registers(const Instruction& in) {
  if (in.op == Op::product) return;
  const auto is_result = [&](const Operand& o) {
    return o.kind == Operand::Kind::reg && products.results.count(o.index) != 0;
  };
  if (!products.results.empty()) {
    if (std::any_of(in.from.begin(), in.from.end(), is_result) ||
        std::any_of(in.to.begin(), in.to.end(), is_result))
      report("wgmma: use of a register before the wait for the product that writes it", in, 0);
    const auto reads = [&](const Product& product) {
      return std::any_of(in.to.begin(), in.to.end(), [&](const Operand& o) {
        return o.kind == Operand::Kind::reg && contains(fragments_of(*product.in), o.index);
      });
    };
    const auto any_reads = [&](const std::vector<Product>& group) {
      return std::any_of(group.begin(), group.end(), reads);
    };
    if (any_reads(products.open) ||
        std::any_of(products.committed.begin(), products.committed.end(), any_reads))
      report("wgmma: a register was written before the wait for the product that reads it", in, 0);
  }
  for (const Operand& o : in.to)
    if (o.kind == Operand::Kind::reg) products.written[o.index] = true;
}

}  // namespace ptx
