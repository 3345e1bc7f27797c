// The engines that this build contains, those that this machine supports, and the one that is used.
#pragma once
#include "engine.h"
#include <string>
#include <vector>

namespace fastcl {

struct Choice {
  const Engine *engine; // null: there is no engine
  std::string reason;   // why this engine was chosen, or why there is none
};

std::vector<const Engine *> built_engines();
std::vector<const Engine *> supported_engines(); // by this machine, slowest first
// The fastest engine. `cap` is the newest engine that may be used, or empty for no limit.
Choice choose_engine(const std::string &cap);

} // namespace fastcl
