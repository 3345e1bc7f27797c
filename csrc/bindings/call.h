// A described call of an engine that needs a workspace to run; shared by the bindings of all families.
#pragma once
#include "bindings/reader.h"
#include "cpu/dispatch.h"
#include <functional>
#include <memory>

namespace fastcl {

// Reports the workspace that it needs, and runs on it with the interpreter's lock released.
class Call {
public:
  // work: the call; with a null workspace it only returns the workspace's size in bytes.
  explicit Call(std::function<int64_t(void *)> work) : work_(std::move(work)) {
    pybind11::gil_scoped_release release;
    workspace_ = work_(nullptr);
  }
  int64_t workspace() const { return workspace_ + ALIGNMENT; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    pybind11::gil_scoped_release release;
    work_(reinterpret_cast<void *>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT));
  }

private:
  static constexpr int64_t ALIGNMENT = 64;
  std::function<int64_t(void *)> work_;
  int64_t workspace_;
};

const Engine *engine_named(const std::string &name);

// Engines add gradients of single numbers in double; `narrow` writes them as reals of the call once it has run.
struct Narrowed {
  double wide = 0;
  void *to = nullptr;
  // The address for the engine: of `wide`, or the caller's own.
  void *in_place_of(void *address, bool narrow) {
    if (!narrow || !address) return address;
    to = address;
    return &wide;
  }
  void write(bool wide_reals) const {
    if (!to) return;
    if (wide_reals) *static_cast<double *>(to) = wide;
    else *static_cast<float *>(to) = float(wide);
  }
};

// A call of an engine's entry that takes only the description.
template <class Description>
std::unique_ptr<Call> call_of(const std::string &engine, int64_t (*Engine::*entry)(const Description &, void *), const Description &call) {
  const Engine *const chosen = engine_named(engine);
  return std::make_unique<Call>([=](void *workspace) { return (chosen->*entry)(call, workspace); });
}

} // namespace fastcl
