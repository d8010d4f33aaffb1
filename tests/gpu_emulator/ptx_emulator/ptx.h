// A PTX module in memory: what the parser makes and the interpreter runs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t {
  u8,
  s8,
  b8,
  u16,
  s16,
  b16,
  u32,
  s32,
  b32,
  u64,
  s64,
  b64,  // integers and untyped bits
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  f32x2,  // floating point
  pred,
  none
};

inline int size_of(Type type) {
  switch (type) {
    case Type::u8:
    case Type::s8:
    case Type::b8:
    case Type::pred:
      return 1;
    case Type::u16:
    case Type::s16:
    case Type::b16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::u32:
    case Type::s32:
    case Type::b32:
    case Type::f32:
    case Type::f16x2:
    case Type::bf16x2:
      return 4;
    default:
      return 8;
  }
}

inline bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

inline bool is_float(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::f64;
}

enum class Op : uint8_t {
  // Arithmetic: every lane by itself, registers only.
  add,
  sub,
  mul,
  mad,
  fma,
  div,
  rem,
  min,
  max,
  neg,
  abs,
  and_,
  or_,
  xor_,
  not_,
  shl,
  shr,
  setp,
  selp,
  cvt,
  ex2,
  lg2,
  rcp,
  sqrt,
  rsqrt,
  bfi,
  bfe,
  prmt,
  shf,
  lop3,
  popc,
  clz,
  brev,
  // Moves and memory.
  mov,
  cvta,
  ld,
  st,
  // Lanes of a warp together.
  shfl,
  ballot,
  warp_barrier,
  ldmatrix,
  stmatrix,
  activemask,
  // Blocks of a cluster.
  mapa,
  getctarank,
  cluster_arrive,
  cluster_wait,
  mma,
  // Asynchronous copies, and matrix products of warp groups.
  copy,
  commit_copies,
  wait_copies,
  product,
  product_fence,
  commit_products,
  wait_products,
  proxy_fence,
  // Control.
  bra,
  call,
  ret,
  exit,
  barrier,
  trap,
  nop
};

enum class Space : uint8_t { generic, global, shared, shared_cluster, local, parameter, constant };

// A comparison is true of unordered operands (NaN) if its name ends with u.
enum class Comparison : uint8_t {
  eq,
  ne,
  lt,
  le,
  gt,
  ge,
  lo,
  ls,
  hi,
  hs,
  equ,
  neu,
  ltu,
  leu,
  gtu,
  geu,
  num,
  nan
};

enum class Logic : uint8_t { none, and_, or_, xor_ };

enum class Shuffle : uint8_t { bfly, idx, up, down };

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctarank,
  cluster_nctarank
};

struct Operand {
  enum class Kind : uint8_t { none, reg, immediate, special, shared, dynamic_shared, parameter, local };
  Kind kind = Kind::none;
  bool negated = false;  // !%p
  int index = 0;         // a register's number, or a Special
  uint64_t value = 0;    // an immediate's bits, or an offset in its space
};

struct Instruction {
  Op op = Op::nop;
  Type type = Type::none, source_type = Type::none;  // the first and the second type of the name
  Space space = Space::generic;
  Comparison comparison = Comparison::eq;
  Logic logic = Logic::none;
  Shuffle shuffle = Shuffle::bfly;
  bool flush = false, saturate = false, high = false, wide = false;  // .ftz, .sat, .hi, .wide
  bool read_only = false;                                            // .nc
  bool to_space = false;                                             // cvta.to
  bool left = false, clamp = false;                                  // shf.l, shf.clamp
  bool propagate_nan = false;                                        // .NaN
  bool transposed = false;                // ldmatrix.trans, or the right factor of a product
  bool left_transposed = false;           // the left factor of a product
  bool relaxed = false, aligned = false;  // barrier.cluster
  int predicate = -1;                     // a register's number, or none
  bool predicate_negated = false;
  std::vector<Operand> to, from;  // a memory access has its address in from[0]
  int64_t offset = 0;             // added to the address
  int64_t source_offset = 0;      // added to the address that cp.async copies from
  int target = -1;                // index of the instruction that a branch goes to
  std::string callee;
  int line = 0;
};

struct Variable {
  int64_t offset, size;
};

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Instruction> code;
  int registers = 0;
  std::vector<Variable> parameters, results;
  int64_t parameter_bytes = 0, local_bytes = 0, static_shared = 0;
  bool has_products = false;  // wgmma
  int most_threads = 0;       // .maxntid or .reqntid; 0 if there is none
};

struct Module {
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, std::vector<uint8_t>> constants;  // module-scope .global and .const variables
};

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

}  // namespace ptx
