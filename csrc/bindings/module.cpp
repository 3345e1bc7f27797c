// The Python module. It takes addresses and integers and does not use torch. Python first describes a call; the call then reports
// the workspace that it needs, and runs on it with the interpreter's lock released. Each family has a file that reads its descriptions.
#include "bindings/call.h"
#include "bindings/families.h"
#include <cstdlib>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace fastcl;

const Engine *fastcl::engine_named(const std::string &name) {
  for (const Engine *engine : supported_engines())
    if (engine->name == name) return engine;
  throw std::invalid_argument("fastcl: no engine " + name + " on this machine");
}

namespace {

std::vector<std::string> names(const std::vector<const Engine *> &engines) {
  std::vector<std::string> result;
  for (const Engine *engine : engines) result.push_back(engine->name);
  return result;
}

} // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastcl's engines in C++: addresses and integers in, nothing of torch.";
  py::class_<Call>(m, "Call", py::module_local()) // module_local, because tests load a second module beside it
      .def_property_readonly("workspace", &Call::workspace, "bytes of workspace that `run` needs")
      .def("run", &Call::run, py::arg("workspace"));
  bind_contrastive(m);
  bind_pairs(m);
  bind_soft(m);
  bind_prototypes(m);
  bind_sinkhorn(m);
  bind_topk(m);
  bind_launches(m);
  m.def("built_engines", [] { return names(built_engines()); }, "instruction sets that this build has an engine for");
  m.def("supported_engines", [] { return names(supported_engines()); }, "those that this machine runs, slowest first");
  m.def(
      "choose_engine",
      [](const std::string &cap) {
        const Choice choice = choose_engine(cap);
        return py::make_tuple(choice.engine ? py::object(py::str(choice.engine->name)) : py::object(py::none()), choice.reason);
      },
      py::arg("cap"), "(name or None, reason); `cap` names the newest instruction set allowed, or is empty");
#ifdef FASTCL_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
  m.def(
      "environment",
      [](const char *name) {
        const char *const value = std::getenv(name);
        return std::string(value ? value : "");
      },
      py::arg("name"), "an environment variable, or an empty string; faster than os.environ, which raises and catches an error inside");
  m.attr("compiler") = FASTCL_COMPILER;
  m.attr("version") = FASTCL_VERSION;
}
