// The emulated GPU of this library.
#pragma once

#include "grid.h"

namespace ptx {

Device& device();

// Adds a module and returns its number.
int load(const std::string& text);
const Module& module_of(int number);
const Function& entry_of(int number, const std::string& name);

// Runs a kernel. `arguments` has the layout of its parameters.
void launch(int number, const std::string& name, Size grid, Size block, Size cluster, int64_t dynamic_shared,
            const std::vector<uint8_t>& arguments);

}  // namespace ptx
