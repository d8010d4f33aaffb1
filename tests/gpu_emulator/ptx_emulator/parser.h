// Reads the text of a PTX module.
#pragma once

#include <string>

#include "ptx.h"

namespace ptx {

// Throws a std::runtime_error that names the line of what it does not know.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx
