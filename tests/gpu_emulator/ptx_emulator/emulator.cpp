// The emulated GPU, and the C functions by which Python uses it.
#include "emulator.h"

#include <cstring>
#include <sstream>

#include "parser.h"

namespace ptx {
namespace {

std::vector<std::unique_ptr<Module>> modules;
std::string error, answer;

const char* answer_with(const std::ostringstream& text) {
  answer = text.str();
  return answer.c_str();
}

// Runs `f`; an exception becomes -1, and its text is kept for emulator_error.
template <class F>
int64_t guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& problem) {
    error = problem.what();
    return -1;
  }
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

int load(const std::string& text) {
  modules.push_back(parse(text));
  return static_cast<int>(modules.size()) - 1;
}

const Module& module_of(int number) { return *modules.at(number); }

const Function& entry_of(int number, const std::string& name) {
  const auto found = module_of(number).functions.find(name);
  if (found == module_of(number).functions.end()) fail("there is no kernel " + name);
  return *found->second;
}

void launch(int number, const std::string& name, Size grid, Size block, Size cluster, int64_t dynamic_shared,
            const std::vector<uint8_t>& arguments) {
  // Parameters are aligned to 16 bytes, as the allocator aligns vectors.
  run(device(),
      Launch{module_of(number), entry_of(number, name), grid, block, cluster, dynamic_shared, arguments});
}

}  // namespace ptx

extern "C" {
#define API __attribute__((visibility("default")))

// Returns the number of the module, or -1.
API int64_t emulator_load(const char* text) {
  return ptx::guarded([&] { return ptx::load(text); });
}

API const char* emulator_error() { return ptx::error.c_str(); }

// Returns the kernels of all modules, one per line.
API const char* emulator_entries() {
  std::ostringstream names;
  for (const auto& module : ptx::modules)
    for (const auto& [name, function] : module->functions)
      if (function->is_entry) names << name << "\n";
  return ptx::answer_with(names);
}

// Writes offset and size of each parameter of a kernel, and returns their number, or -1.
API int64_t emulator_parameters(int module, const char* name, int64_t* places, int64_t most) {
  return ptx::guarded([&] {
    const auto& parameters = ptx::entry_of(module, name).parameters;
    for (size_t i = 0; i < parameters.size() && static_cast<int64_t>(i) < most; ++i)
      places[2 * i] = parameters[i].offset, places[2 * i + 1] = parameters[i].size;
    return parameters.size();
  });
}

// Returns 0, or -1 if the kernel stopped.
API int64_t emulator_launch(int module, const char* name, const int* grid, const int* block,
                            const int* cluster, int64_t dynamic_shared, const uint8_t* arguments,
                            int64_t bytes) {
  return ptx::guarded([&] {
    const auto size = [](const int* of) { return ptx::Size{of[0], of[1], of[2]}; };
    ptx::launch(module, name, size(grid), size(block), size(cluster), dynamic_shared,
                std::vector<uint8_t>(arguments, arguments + bytes));
    return 0;
  });
}

API void emulator_allow(uint64_t begin, uint64_t size, int writable) {
  ptx::device().memory.allow(begin, size, writable != 0);
}
API void emulator_forget() { ptx::device().memory.forget(); }

API void emulator_set_options(int drop_barriers, int count_traffic, int drop_cluster_barriers) {
  ptx::device().options = {drop_barriers != 0, count_traffic != 0, drop_cluster_barriers != 0};
}

// Returns lines of fields that tabs separate: "problem", count, what, where first; "kernel", name, launches,
// instructions, distinct sectors loaded and stored, most loads of a thread; "traffic", kernel, kind,
// requests, bytes, sectors, lines.
API const char* emulator_report() {
  std::ostringstream text;
  for (const auto& [what, problem] : ptx::device().problems)
    text << "problem\t" << problem.count << "\t" << what << "\t" << problem.first << "\n";
  for (const auto& [name, kernel] : ptx::device().kernels) {
    text << "kernel\t" << name << "\t" << kernel.launches << "\t" << kernel.instructions << "\t"
         << kernel.loaded_sectors << "\t" << kernel.stored_sectors << "\t" << kernel.most_loads << "\n";
    for (const auto& [kind, t] : kernel.traffic)
      text << "traffic\t" << name << "\t" << kind << "\t" << t.requests << "\t" << t.bytes << "\t"
           << t.sectors << "\t" << t.lines << "\n";
  }
  return ptx::answer_with(text);
}

API void emulator_reset() { ptx::device().problems.clear(), ptx::device().kernels.clear(); }
}
