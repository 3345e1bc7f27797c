// Reads descriptions of calls from Python.
#pragma once
#include "problem.h"
#include <pybind11/pybind11.h>
#include <stdexcept>
#include <string>

namespace fastcl {

// Reads the integers of a tuple one after another.
class Reader {
public:
  explicit Reader(const pybind11::tuple &tuple) : tuple_(tuple) {}
  int64_t integer() {
    if (at_ >= pybind11::ssize_t(tuple_.size())) throw std::invalid_argument("fastcl: too few numbers in a description");
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_.ptr(), at_++));
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  template <class T = void> T *address() { return reinterpret_cast<T *>(integer()); }
  Rows rows() {
    Rows r;
    r.dtype = Dtype(integer());
    r.data = address<const void>();
    r.size = integer();
    r.row_stride = integer();
    r.column_stride = integer();
    return r;
  }
  void end() const {
    if (at_ != pybind11::ssize_t(tuple_.size())) throw std::invalid_argument("fastcl: too many numbers in a description");
  }

private:
  const pybind11::tuple &tuple_;
  pybind11::ssize_t at_ = 0;
};

inline void require(bool condition, const char *what) {
  if (!condition) throw std::invalid_argument(std::string("fastcl: ") + what);
}

} // namespace fastcl
