#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <unordered_map>

namespace ptx {
namespace {

using std::string;
using std::vector;

const std::unordered_map<string, Type> kTypes{
    {"u8", Type::u8},       {"s8", Type::s8},         {"b8", Type::b8},       {"u16", Type::u16},
    {"s16", Type::s16},     {"b16", Type::b16},       {"u32", Type::u32},     {"s32", Type::s32},
    {"b32", Type::b32},     {"u64", Type::u64},       {"s64", Type::s64},     {"b64", Type::b64},
    {"f16", Type::f16},     {"bf16", Type::bf16},     {"f32", Type::f32},     {"f64", Type::f64},
    {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"f32x2", Type::f32x2}, {"pred", Type::pred}};

const std::unordered_map<string, Special> kSpecials{{"%tid.x", Special::tid_x},
                                                    {"%tid.y", Special::tid_y},
                                                    {"%tid.z", Special::tid_z},
                                                    {"%ntid.x", Special::ntid_x},
                                                    {"%ntid.y", Special::ntid_y},
                                                    {"%ntid.z", Special::ntid_z},
                                                    {"%ctaid.x", Special::ctaid_x},
                                                    {"%ctaid.y", Special::ctaid_y},
                                                    {"%ctaid.z", Special::ctaid_z},
                                                    {"%nctaid.x", Special::nctaid_x},
                                                    {"%nctaid.y", Special::nctaid_y},
                                                    {"%nctaid.z", Special::nctaid_z},
                                                    {"%laneid", Special::laneid},
                                                    {"%warpid", Special::warpid},
                                                    {"%cluster_ctaid.x", Special::cluster_ctaid_x},
                                                    {"%cluster_ctaid.y", Special::cluster_ctaid_y},
                                                    {"%cluster_ctaid.z", Special::cluster_ctaid_z},
                                                    {"%cluster_nctaid.x", Special::cluster_nctaid_x},
                                                    {"%cluster_nctaid.y", Special::cluster_nctaid_y},
                                                    {"%cluster_nctaid.z", Special::cluster_nctaid_z},
                                                    {"%clusterid.x", Special::clusterid_x},
                                                    {"%clusterid.y", Special::clusterid_y},
                                                    {"%clusterid.z", Special::clusterid_z},
                                                    {"%nclusterid.x", Special::nclusterid_x},
                                                    {"%nclusterid.y", Special::nclusterid_y},
                                                    {"%nclusterid.z", Special::nclusterid_z},
                                                    {"%cluster_ctarank", Special::cluster_ctarank},
                                                    {"%cluster_nctarank", Special::cluster_nctarank}};

const std::unordered_map<string, Comparison> kComparisons{
    {"eq", Comparison::eq},   {"ne", Comparison::ne},   {"lt", Comparison::lt},   {"le", Comparison::le},
    {"gt", Comparison::gt},   {"ge", Comparison::ge},   {"lo", Comparison::lo},   {"ls", Comparison::ls},
    {"hi", Comparison::hi},   {"hs", Comparison::hs},   {"equ", Comparison::equ}, {"neu", Comparison::neu},
    {"ltu", Comparison::ltu}, {"leu", Comparison::leu}, {"gtu", Comparison::gtu}, {"geu", Comparison::geu},
    {"num", Comparison::num}, {"nan", Comparison::nan}};

// Instructions of one destination, followed by their sources.
const std::unordered_map<string, Op> kPlain{{"add", Op::add},   {"sub", Op::sub},
                                            {"mul", Op::mul},   {"mad", Op::mad},
                                            {"fma", Op::fma},   {"div", Op::div},
                                            {"rem", Op::rem},   {"min", Op::min},
                                            {"max", Op::max},   {"neg", Op::neg},
                                            {"abs", Op::abs},   {"and", Op::and_},
                                            {"or", Op::or_},    {"xor", Op::xor_},
                                            {"not", Op::not_},  {"shl", Op::shl},
                                            {"shr", Op::shr},   {"selp", Op::selp},
                                            {"cvt", Op::cvt},   {"ex2", Op::ex2},
                                            {"lg2", Op::lg2},   {"rcp", Op::rcp},
                                            {"sqrt", Op::sqrt}, {"bfi", Op::bfi},
                                            {"bfe", Op::bfe},   {"prmt", Op::prmt},
                                            {"shf", Op::shf},   {"rsqrt", Op::rsqrt},
                                            {"lop3", Op::lop3}, {"popc", Op::popc},
                                            {"clz", Op::clz},   {"brev", Op::brev},
                                            {"cvta", Op::cvta}, {"activemask", Op::activemask}};

string strip(const string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == string::npos ? "" : text.substr(first, last - first + 1);
}

bool begins_with(const string& text, const char* start) { return text.compare(0, strlen(start), start) == 0; }
bool contains(const string& text, const char* what) { return text.find(what) != string::npos; }

// Splits at commas that are outside of brackets.
vector<string> split(const string& text) {
  vector<string> parts;
  string part;
  int depth = 0;
  for (const char c : text) {
    if (strchr("{([", c) != nullptr) ++depth;
    if (strchr("})]", c) != nullptr) --depth;
    if (c == ',' && depth == 0)
      parts.push_back(strip(part)), part.clear();
    else
      part += c;
  }
  if (!strip(part).empty()) parts.push_back(strip(part));
  return parts;
}

// Replaces comments by spaces; line numbers stay.
string without_comments(const string& text) {
  string out = text;
  for (size_t i = 0; i + 1 < out.size(); ++i) {
    if (out[i] != '/') continue;
    size_t end = i;
    if (out[i + 1] == '/')
      end = std::min(out.find('\n', i), out.size());
    else if (out[i + 1] == '*')
      end = std::min(out.find("*/", i + 2), out.size() - 2) + 2;
    for (; i < end; ++i)
      if (out[i] != '\n') out[i] = ' ';
  }
  return out;
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ".align 8 .b8 name[32]" and the like.
struct Declaration {
  string name;
  Type type = Type::b8;
  int64_t size = 0, align = 0;

  explicit Declaration(const string& text) {
    std::istringstream words(text);
    bool of_pointee = false;  // what follows .ptr describes the memory that a parameter points to
    for (string word; words >> word;) {
      if (word == ".ptr") of_pointee = true;
      if (word == ".align") {
        int64_t value = 0;
        words >> value;
        if (!of_pointee) align = value;
      } else if (word[0] == '.') {
        const auto found = kTypes.find(word.substr(1));
        if (found != kTypes.end()) type = found->second;
      } else {
        string rest;
        std::getline(words, rest);
        name = word + strip(rest);
        break;
      }
    }
    const size_t bracket = name.find('[');
    const int64_t count = bracket == string::npos ? 1 : atoll(name.c_str() + bracket + 1);
    name = name.substr(0, bracket);
    size = size_of(type) * count;
    if (align == 0) align = size_of(type);
  }
};

class Parser {
 public:
  explicit Parser(const string& source) : text(without_comments(source)), module(new Module) {}

  std::unique_ptr<Module> run() {
    for (skip_space(); at < text.size(); skip_space()) top_level();
    return std::move(module);
  }

 private:
  // --- The text.

  void skip_space() {
    for (; at < text.size() && isspace(static_cast<unsigned char>(text[at])); ++at)
      if (text[at] == '\n') ++line;
  }
  string next_word() const {
    size_t end = at;
    while (end < text.size() && !isspace(static_cast<unsigned char>(text[end]))) ++end;
    return text.substr(at, end - at);
  }
  void skip_line() { at = std::min(text.find('\n', at), text.size()); }
  // Reads up to one of `stops` outside of parentheses, which stays.
  string read_until(const char* stops) {
    const size_t first = at;
    for (int depth = 0; at < text.size(); ++at) {
      if (depth == 0 && strchr(stops, text[at]) != nullptr) break;
      if (text[at] == '\n') ++line;
      if (text[at] == '(') ++depth;
      if (text[at] == ')') --depth;
    }
    return strip(text.substr(first, at - first));
  }
  string read_statement() {
    string statement = read_until(";");
    ++at;
    for (char& c : statement)
      if (c == '\n' || c == '\t') c = ' ';
    return statement;
  }
  [[noreturn]] void unknown(const string& what) const {
    fail("PTX line " + std::to_string(line) + ": the emulator does not know '" + what.substr(0, 120) + "'" +
         (f == nullptr ? "" : " in " + f->name));
  }

  // --- The module.

  void top_level() {
    const string word = next_word();
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file" ||
        word == ".loc")
      return skip_line();
    if (word == ".section") {  // debug information
      read_until("}");
      ++at;
      return;
    }
    const string head = read_until("{;");
    const bool has_body = text[at++] == '{';
    if (contains(head, ".entry") || contains(head, ".func")) {
      if (has_body) function(head);
    } else if (contains(head, ".shared")) {
      declare_shared(head);
    } else if (contains(head, ".global") || contains(head, ".const")) {
      string values;
      if (has_body) values = read_until("}"), read_until(";"), ++at;
      declare_constant(head.substr(0, head.find('=')), values);
    } else if (!head.empty() && !begins_with(head, ".pragma")) {
      unknown(head);
    }
  }

  void declare_shared(const string& text_of_it) {
    const Declaration d(text_of_it);
    if (contains(text_of_it, ".extern"))
      dynamic_shared = d.name;
    else
      shared.emplace(d.name, d);
  }

  void declare_constant(const string& text_of_it, const string& values) {
    const Declaration d(text_of_it);
    vector<uint8_t> data(d.size);
    const int step = size_of(d.type);
    int64_t offset = 0;
    for (const string& value : split(values)) {
      const uint64_t bits = strtoull(value.c_str(), nullptr, 0);
      if (offset + step > d.size) unknown(values);
      memcpy(&data[offset], &bits, step), offset += step;
    }
    module->constants[d.name] = data;
  }

  // --- Functions.

  void function(const string& head) {
    auto owner = std::make_unique<Function>();
    f = owner.get();
    parameters.clear(), locals.clear(), placed.clear(), labels.clear(), jumps.clear(), scopes.clear();
    f->is_entry = contains(head, ".entry");
    signature(head);
    body();
    for (const auto& [instruction, label] : jumps) {
      const auto found = labels.find(label);
      if (found == labels.end()) unknown(label);
      f->code[instruction].target = found->second;
    }
    Instruction end;
    end.op = Op::ret;
    f->code.push_back(end);
    f = nullptr;
    module->functions[owner->name] = std::move(owner);
  }

  void signature(const string& head) {
    const char* const keyword = f->is_entry ? ".entry" : ".func";
    string rest = strip(head.substr(head.find(keyword) + strlen(keyword))), results;
    if (rest[0] == '(') {
      const size_t end = rest.find(')');
      results = rest.substr(1, end - 1), rest = strip(rest.substr(end + 1));
    }
    f->name = rest.substr(0, rest.find_first_of("( \t\n"));
    const size_t open = rest.find('('), close = rest.find(')');
    if (open != string::npos) add_parameters(rest.substr(open + 1, close - open - 1), f->parameters);
    add_parameters(results, f->results);
    const string tail = close == string::npos ? "" : rest.substr(close + 1);
    for (const char* const bound : {".maxntid", ".reqntid"}) {
      const size_t found = tail.find(bound);
      if (found != string::npos) f->most_threads = product_of(tail.substr(found + strlen(bound)));
    }
  }

  // The product of "256, 1, 1".
  static int product_of(const string& numbers) {
    int product = 1;
    for (const char* c = numbers.c_str();;) {
      char* end = nullptr;
      product *= static_cast<int>(strtol(c, &end, 10));
      while (*end == ' ') ++end;
      if (*end != ',') return product;
      c = end + 1;
    }
  }

  void add_parameters(const string& list, vector<Variable>& to) {
    for (const string& one : split(list)) {
      const Declaration d(one);
      f->parameter_bytes = round_up(f->parameter_bytes, d.align);
      to.push_back({f->parameter_bytes, d.size});
      parameters[d.name] = f->parameter_bytes;
      f->parameter_bytes += d.size;
    }
  }

  void body() {
    scopes.emplace_back();
    while (!scopes.empty()) {
      skip_space();
      if (at >= text.size()) unknown("the end of the text");
      if (text[at] == '{') {
        scopes.emplace_back(), ++at;
      } else if (text[at] == '}') {
        scopes.pop_back(), ++at;
      } else if (text[at] == ';') {
        ++at;
      } else if (begins_with(next_word(), ".loc")) {
        skip_line();
      } else if (!label()) {
        const int first_line = line;
        const string statement = read_statement();
        if (statement[0] == '.')
          directive(statement);
        else
          instruction(statement, first_line);
      }
    }
  }

  bool label() {
    const auto in_name = [](char c) {
      return isalnum(static_cast<unsigned char>(c)) || c == '$' || c == '_' || c == '%' || c == '.';
    };
    size_t end = at;
    while (in_name(text[end])) ++end;  // a string ends with a zero
    if (end == at || text[end] != ':' || text[end + 1] == ':') return false;
    labels[text.substr(at, end - at)] = static_cast<int>(f->code.size());
    at = end + 1;
    return true;
  }

  void directive(const string& statement) {
    if (begins_with(statement, ".reg")) {
      const string names = strip(statement.substr(4));
      for (const string& name : split(names.substr(names.find_first_of(" \t")))) declare_registers(name);
    } else if (begins_with(statement, ".param") || begins_with(statement, ".local")) {
      // Parameters of calls are local memory of the caller.
      const Declaration d(statement);
      locals[d.name] = f->local_bytes;
      f->local_bytes = round_up(f->local_bytes + d.size, 16);
    } else if (contains(statement, ".shared")) {
      declare_shared(statement);
    } else if (!begins_with(statement, ".pragma")) {
      unknown(statement);
    }
  }

  void declare_registers(const string& name) {
    const size_t bracket = name.find('<');  // %r<9> are %r0 to %r8
    if (bracket == string::npos) {
      scopes.back()[name] = f->registers++;
      return;
    }
    const string base = name.substr(0, bracket);
    const int count = atoi(name.c_str() + bracket + 1);
    for (int i = 0; i < count; ++i) scopes.back()[base + std::to_string(i)] = f->registers++;
  }

  int find_register(const string& name) const {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return -1;
  }

  // --- Operands.

  Operand operand(const string& name) {
    Operand o;
    if (name.empty()) unknown("an operand that is missing");
    if (name[0] == '!') {
      o = operand(name.substr(1));
      o.negated = true;
      return o;
    }
    const int number = find_register(name);
    if (number >= 0) {
      o.kind = Operand::Kind::reg, o.index = number;
    } else if (name == "_") {
      o.kind = Operand::Kind::none;
    } else if (name[0] == '%') {
      const auto found = kSpecials.find(name);
      if (found == kSpecials.end()) unknown(name);
      o.kind = Operand::Kind::special, o.index = static_cast<int>(found->second);
    } else if (isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') {
      o.kind = Operand::Kind::immediate, o.value = immediate(name);
    } else {
      symbol(name, o);
    }
    return o;
  }

  static uint64_t immediate(const string& name) {
    if (begins_with(name, "0f") || begins_with(name, "0F") || begins_with(name, "0d") ||
        begins_with(name, "0D"))
      return strtoull(name.c_str() + 2, nullptr, 16);
    if (name[0] == '-') return static_cast<uint64_t>(strtoll(name.c_str(), nullptr, 0));
    return strtoull(name.c_str(), nullptr, 0);
  }

  void symbol(const string& name, Operand& o) {
    const size_t plus = name.find('+');
    const string base = strip(name.substr(0, plus));
    o.value = plus == string::npos ? 0 : strtoll(name.c_str() + plus + 1, nullptr, 0);
    const auto parameter = parameters.find(base), local = locals.find(base);
    const auto constant = module->constants.find(base);
    if (parameter != parameters.end()) {
      o.kind = Operand::Kind::parameter, o.value += parameter->second;
    } else if (local != locals.end()) {
      o.kind = Operand::Kind::local, o.value += local->second;
    } else if (shared.count(base) != 0) {
      o.kind = Operand::Kind::shared, o.value += place_shared(base);
    } else if (!base.empty() && base == dynamic_shared) {
      o.kind = Operand::Kind::dynamic_shared;
    } else if (constant != module->constants.end()) {
      o.kind = Operand::Kind::immediate;
      o.value += reinterpret_cast<uintptr_t>(constant->second.data());
    } else {
      unknown(name);
    }
  }

  // Static shared memory is declared for the module, but each entry has only what it uses.
  int64_t place_shared(const string& name) {
    const auto found = placed.find(name);
    if (found != placed.end()) return found->second;
    if (!f->is_entry) unknown("shared memory of a function that is not inlined");
    const Declaration& d = shared.at(name);
    f->static_shared = round_up(f->static_shared, d.align);
    placed[name] = f->static_shared, f->static_shared += d.size;
    return placed[name];
  }

  vector<Operand> operands(const string& list) {
    vector<Operand> out;
    for (const string& name : split(list)) out.push_back(operand(name));
    return out;
  }
  // One operand, or a vector of them in braces or parentheses.
  vector<Operand> vector_of(const string& name) {
    const bool bare = name[0] != '{' && name[0] != '(';
    return operands(bare ? name : name.substr(1, name.size() - 2));
  }

  // --- Instructions.

  void instruction(string statement, int first_line) {
    Instruction in;
    in.line = first_line;
    if (statement[0] == '@') {
      const size_t end = statement.find(' ');
      in.predicate_negated = statement[1] == '!';
      in.predicate =
          find_register(statement.substr(in.predicate_negated ? 2 : 1, end - (in.predicate_negated ? 2 : 1)));
      if (in.predicate < 0) unknown(statement);
      statement = strip(statement.substr(end));
    }
    const size_t end = std::min(statement.find_first_of(" {"), statement.size());
    const vector<string> arguments = split(statement.substr(end));
    std::istringstream stream(statement.substr(0, end));
    words.clear();
    for (string word; std::getline(stream, word, '.');) words.push_back(word);
    set_modifiers(in);
    if (!decode(in, arguments)) unknown(statement);
    f->code.push_back(in);
  }

  bool has(const char* word) const {
    return std::any_of(words.begin() + 1, words.end(), [&](const string& w) { return w == word; });
  }

  void set_modifiers(Instruction& in) {
    for (const string& word : words) {
      const auto found = kTypes.find(word);
      if (found == kTypes.end()) continue;
      (in.type == Type::none ? in.type : in.source_type) = found->second;
    }
    in.flush = has("ftz"), in.saturate = has("sat"), in.high = has("hi"), in.wide = has("wide");
    in.read_only = has("nc"), in.to_space = has("to"), in.left = has("l"), in.transposed = has("trans");
    in.clamp = has("clamp"), in.propagate_nan = has("NaN");
  }

  Space space() const {
    for (const string& word : words) {
      if (word == "global") return Space::global;
      if (word == "local") return Space::local;
      if (word == "param") return Space::parameter;
      if (word == "const") return Space::constant;
      if (word == "shared" || word == "shared::cta") return Space::shared;
      if (word == "shared::cluster") return Space::shared_cluster;
    }
    return Space::generic;
  }

  // Returns false if the emulator does not know the instruction.
  bool decode(Instruction& in, const vector<string>& arguments) {
    const string& name = words[0];
    const auto plain = kPlain.find(name);
    if (plain != kPlain.end()) {
      in.op = plain->second;
      return decode_plain(in, arguments);
    }
    if (name == "mov") {
      in.op = Op::mov, in.to = vector_of(arguments[0]), in.from = vector_of(arguments[1]);
      return true;
    }
    if (name == "setp") return decode_comparison(in, arguments);
    if (name == "ld" || name == "ldmatrix") {
      in.op = name == "ld" ? Op::ld : Op::ldmatrix;
      in.to = vector_of(arguments[0]);
      decode_access(in, arguments[1]);
      return true;
    }
    if (name == "st" || name == "stmatrix") {
      in.op = name == "st" ? Op::st : Op::stmatrix;
      in.from = vector_of(arguments[1]);
      decode_access(in, arguments[0]);
      return true;
    }
    if (name == "cp" && has("async")) return decode_copy(in, arguments);
    if (name == "mma" || name == "wgmma") return decode_product(in, arguments);
    return decode_cluster(in, arguments) || decode_control(in, arguments);
  }

  bool decode_cluster(Instruction& in, const vector<string>& arguments) {
    const string& name = words[0];
    if (name == "mapa" || name == "getctarank") {
      in.op = name == "mapa" ? Op::mapa : Op::getctarank, in.space = space();
      in.to = {operand(arguments[0])};
      for (size_t i = 1; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
      return true;
    }
    if (name != "barrier" || !has("cluster")) return false;
    in.op = has("arrive") ? Op::cluster_arrive : Op::cluster_wait;
    in.relaxed = has("relaxed"), in.aligned = has("aligned");
    return has("arrive") != has("wait") && arguments.empty();
  }

  bool decode_plain(Instruction& in, const vector<string>& arguments) {
    in.to = {operand(arguments[0])};
    for (size_t i = 1; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
    if (in.op == Op::cvta) in.space = space();
    if (in.op == Op::shf && has("wrap") == has("clamp")) return false;
    if (in.op == Op::cvt && in.saturate) return false;
    // Results are rounded to nearest even, and to integers towards zero. There is no carry flag.
    const bool to_integer = in.op == Op::cvt && !is_float(in.type) && in.source_type != Type::none;
    if (has("rzi") && !to_integer) return false;
    const char* const unknown_words[] = {"rz", "rm", "rp", "rni", "rmi", "rpi", "cc", "relu"};
    return std::none_of(std::begin(unknown_words), std::end(unknown_words),
                        [&](const char* w) { return has(w); });
  }

  bool decode_comparison(Instruction& in, const vector<string>& arguments) {
    in.op = Op::setp;
    in.comparison = kComparisons.at(words[1]);
    in.logic = has("and") ? Logic::and_ : has("or") ? Logic::or_ : has("xor") ? Logic::xor_ : Logic::none;
    in.to = pair_of(arguments[0]);
    for (size_t i = 1; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
    return true;
  }

  // "%p1|%p2", or one of them.
  vector<Operand> pair_of(const string& names) {
    const size_t bar = names.find('|');
    vector<Operand> out{operand(names.substr(0, bar))};
    if (bar != string::npos) out.push_back(operand(names.substr(bar + 1)));
    return out;
  }

  void decode_access(Instruction& in, const string& address) {
    in.space = space();
    if (in.source_type != Type::none) in.type = in.source_type;
    in.from.insert(in.from.begin(), address_of(address, in.offset));
  }

  // "[base + offset]", where the offset may be missing.
  Operand address_of(const string& address, int64_t& offset) {
    string base = strip(address.substr(1, address.rfind(']') - 1));
    const size_t plus = base.find('+', 1);
    if (plus != string::npos) {
      offset = strtoll(base.c_str() + plus + 1, nullptr, 0);
      base = strip(base.substr(0, plus));
    }
    return operand(base);
  }

  // "cp.async.cg.shared.global [to], [from], bytes, bytes that are read", where the last may be missing; the
  // rest is filled with zeros.
  bool decode_copy(Instruction& in, const vector<string>& arguments) {
    if (has("commit_group") || has("wait_group") || has("wait_all")) {
      in.op = has("commit_group") ? Op::commit_copies : Op::wait_copies;
      if (has("wait_group")) in.from = operands(arguments[0]);
      return true;
    }
    if (words.size() < 5 || (words[2] != "ca" && words[2] != "cg") || space() != Space::shared ||
        !has("global") || arguments.size() < 3)
      return false;
    in.op = Op::copy, in.space = Space::shared;
    in.from = {address_of(arguments[0], in.offset), address_of(arguments[1], in.source_offset)};
    for (size_t i = 2; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
    const uint64_t bytes = in.from[2].value;
    return in.from.size() <= 4 && in.from[2].kind == Operand::Kind::immediate &&
           (bytes == 4 || bytes == 8 || bytes == 16);
  }

  // "mma D, A, B, C", and "wgmma D, A, B, whether D is added, 1, 1, whether A and B are transposed".
  bool decode_product(Instruction& in, const vector<string>& arguments) {
    static const std::unordered_map<string, Op> kOthers{{"fence", Op::product_fence},
                                                        {"commit_group", Op::commit_products},
                                                        {"wait_group", Op::wait_products}};
    const auto other = kOthers.find(words[1]);
    if (words[0] == "wgmma" && other != kOthers.end()) {
      in.op = other->second;
      if (in.op == Op::wait_products) in.from = operands(arguments[0]);
      return true;
    }
    in.source_type = has("f16") ? Type::f16 : Type::bf16;
    const string factors = has("f16") ? ".f32.f16.f16" : ".f32.bf16.bf16";
    string name = words[0];
    for (size_t i = 1; i < words.size(); ++i) name += "." + words[i];
    in.to = vector_of(arguments[0]), in.from = vector_of(arguments[1]);
    const size_t registers_of_a = in.from.size();
    for (const Operand& o : vector_of(arguments[2])) in.from.push_back(o);
    for (const Operand& o : vector_of(arguments[3])) in.from.push_back(o);
    if (name == "mma.sync.aligned.m16n8k16.row.col" + factors + ".f32") {
      in.op = Op::mma;
      return in.to.size() == 4 && in.from.size() == 10;
    }
    if (!f->is_entry) return false;
    in.op = Op::product, f->has_products = true;
    const string columns = std::to_string(2 * in.to.size());
    const bool loads_a = registers_of_a == 1;
    if (name != "wgmma.mma_async.sync.aligned.m64n" + columns + "k16" + factors ||
        in.from.size() != (loads_a ? 3 : 6) || arguments.size() != (loads_a ? 8 : 7) || arguments[4] != "1" ||
        arguments[5] != "1")
      return false;
    in.left_transposed = loads_a && arguments[6] == "1", in.transposed = arguments.back() == "1";
    return true;
  }

  bool decode_control(Instruction& in, const vector<string>& arguments) {
    const string& name = words[0];
    if (name == "bra") {
      in.op = Op::bra, jumps.emplace_back(f->code.size(), arguments[0]);
    } else if (name == "ret" || name == "exit") {
      in.op = name == "exit" || f->is_entry ? Op::exit : Op::ret;
    } else if (name == "trap") {
      in.op = Op::trap;
    } else if (name == "membar" || name == "fence") {
      in.op = has("proxy") && has("async") ? Op::proxy_fence : Op::nop;
    } else if ((name == "bar" || name == "barrier") && has("sync") && arguments.size() == 1) {
      in.op = has("warp") ? Op::warp_barrier : Op::barrier, in.from = operands(arguments[0]);
    } else if (name == "shfl") {
      in.op = Op::shfl, in.to = pair_of(arguments[0]);
      in.shuffle = has("bfly")  ? Shuffle::bfly
                   : has("idx") ? Shuffle::idx
                   : has("up")  ? Shuffle::up
                                : Shuffle::down;
      for (size_t i = 1; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
    } else if (name == "vote" && has("sync") && has("ballot")) {
      in.op = Op::ballot, in.to = operands(arguments[0]);
      for (size_t i = 1; i < arguments.size(); ++i) in.from.push_back(operand(arguments[i]));
    } else if (name == "call") {
      decode_call(in, arguments);
    } else {
      return false;
    }
    return true;
  }

  // "(result), function, (parameters)"; the first and the last may be missing.
  void decode_call(Instruction& in, const vector<string>& arguments) {
    size_t next = 0;
    in.op = Op::call;
    if (arguments[0][0] == '(') in.to = vector_of(arguments[next++]);
    in.callee = arguments[next++];
    if (next < arguments.size()) in.from = vector_of(arguments[next]);
  }

  const string text;
  std::unique_ptr<Module> module;
  size_t at = 0;
  int line = 1;
  std::map<string, Declaration> shared;
  string dynamic_shared;

  Function* f = nullptr;  // the function that is being read
  std::unordered_map<string, int64_t> parameters, locals, placed;
  std::unordered_map<string, int> labels;
  vector<std::pair<size_t, string>> jumps;
  vector<std::unordered_map<string, int>> scopes;  // names of registers
  vector<string> words;                            // words of the current instruction's name
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
