// Which engines this build carries, which of them this machine runs, and which one is used.
#pragma once
#include "engine.h"
#include <string>
#include <vector>

namespace fastcl {

struct Choice {
  const Engine *engine; // null: none
  std::string reason;   // why this one, or why none
};

std::vector<const Engine *> built_engines();
std::vector<const Engine *> supported_engines(); // by this machine, slowest first
// The fastest engine; `cap` (an engine's name, or empty) excludes all that are newer and includes that one.
Choice choose_engine(const std::string &cap);

} // namespace fastcl
