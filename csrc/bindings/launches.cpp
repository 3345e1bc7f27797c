// Launches of compiled CUDA kernels that a tape repeats: described once, made in one call with other addresses.
#include "bindings/families.h"
#include "bindings/reader.h"
#include <vector>

namespace py = pybind11;

namespace fastcl {
namespace {

// Functions of the CUDA driver, whose addresses Python passes: the module does not link the driver.
struct Driver {
  int (*launch)(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void *stream,
                void **parameters, void **extra);                                 // cuLaunchKernel
  int (*fill)(uint64_t address, unsigned char value, size_t bytes, void *stream); // cuMemsetD8Async
  int (*current)(void **context);                                                 // cuCtxGetCurrent
  int (*make_current)(void *context);                                             // cuCtxSetCurrent
};

Driver read_driver(int64_t launch, int64_t fill, int64_t current, int64_t make_current) {
  require(launch && fill && current && make_current, "driver: a null pointer");
  Driver driver{};
  driver.launch = reinterpret_cast<decltype(driver.launch)>(launch);
  driver.fill = reinterpret_cast<decltype(driver.fill)>(fill);
  driver.current = reinterpret_cast<decltype(driver.current)>(current);
  driver.make_current = reinterpret_cast<decltype(driver.make_current)>(make_current);
  return driver;
}

void check(int result, const char *what) {
  if (result != 0) throw std::runtime_error(std::string("fastcl: ") + what + ": error " + std::to_string(result) + " of the CUDA driver");
}

// A parameter takes eight bytes here; a kernel reads as many of them as its type has.
class Launches {
public:
  // launches: for each (function, x, y, z, threads, bytes of shared memory, parameters); a parameter is (base, value): value, plus the
  // number with the index `base` among those of the call, or -1. Function 0 fills memory with zeros: its parameters are an address and
  // the number of bytes. context: the CUDA context that the functions belong to.
  Launches(int64_t context, const py::list &launches) : context_(reinterpret_cast<void *>(context)) {
    for (const py::handle &each : launches) {
      const py::tuple described = py::cast<py::tuple>(each), parameters = py::cast<py::tuple>(described[6]);
      Launch launch{};
      launch.function = reinterpret_cast<void *>(py::cast<int64_t>(described[0]));
      for (int k = 0; k < 5; ++k) launch.numbers[k] = py::cast<unsigned>(described[k + 1]);
      launch.first = values_.size();
      for (const py::handle &parameter : parameters) {
        const auto [base, value] = py::cast<std::pair<int, uint64_t>>(parameter);
        if (base >= 0) based_.push_back({values_.size(), size_t(base)});
        if (base >= bases_) bases_ = base + 1;
        values_.push_back(value);
      }
      launches_.push_back(launch);
    }
  }

  void run(const Driver &driver, int64_t stream, const py::args &bases) const {
    require(int(bases.size()) >= bases_, "bases: too few");
    std::vector<uint64_t> values = values_; // of this call: several threads may make it
    for (const Based &each : based_) values[each.value] += py::cast<uint64_t>(bases[each.base]);
    std::vector<void *> addresses(values.size());
    for (size_t k = 0; k < values.size(); ++k) addresses[k] = &values[k];
    py::gil_scoped_release release;
    // A thread of autograd has no context until it has called CUDA.
    void *context = nullptr;
    check(driver.current(&context), "asking for the context");
    if (context != context_) check(driver.make_current(context_), "making a context the current one");
    for (const Launch &each : launches_) {
      const unsigned *n = each.numbers;
      if (!each.function) {
        check(driver.fill(values[each.first], 0, values[each.first + 1], reinterpret_cast<void *>(stream)), "filling memory");
        continue;
      }
      check(driver.launch(each.function, n[0], n[1], n[2], n[3], 1, 1, n[4], reinterpret_cast<void *>(stream), &addresses[each.first], nullptr),
            "launching a kernel");
    }
  }

private:
  struct Launch {
    void *function;
    unsigned numbers[5]; // grid, threads of a block, shared memory
    size_t first;        // parameter
  };
  struct Based {
    size_t value, base;
  };
  void *context_;
  int bases_ = 0;
  std::vector<uint64_t> values_;
  std::vector<Based> based_;
  std::vector<Launch> launches_;
};

} // namespace

void bind_launches(py::module_ &m) {
  py::class_<Driver>(m, "Driver", py::module_local())
      .def(py::init(&read_driver), "addresses of cuLaunchKernel, cuMemsetD8Async, cuCtxGetCurrent, cuCtxSetCurrent");
  py::class_<Launches>(m, "Launches", py::module_local())
      .def(py::init<int64_t, const py::list &>(), py::arg("context"), py::arg("launches"))
      .def("run", &Launches::run, "run(driver, stream, *bases)");
}

} // namespace fastcl
