#include "runtime.h"
#include <mutex>

namespace fastcl::cuda {

#ifdef FASTCL_EMULATOR // a small device, so that small problems fill it

bool emulated() { return true; }
std::string driver_failure() { return ""; }
int driver_version() { return 0; }
int runtime_version() { return 0; }
const Device &device(int) {
  static const Device emulated{emulator::PROCESSORS, emulator::SHARED, 90};
  return emulated;
}
void check(cudaError_t, const char *) {}
void require_current(int) {}

#else

bool emulated() { return false; }

namespace {

std::string number(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a device's properties");
  return value;
}

} // namespace

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}

std::string driver_failure() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count ? "" : "there is no CUDA device";
  (void)cudaGetLastError();
  const int driver = driver_version(), runtime = runtime_version();
  if (driver == 0) return "there is no NVIDIA driver";
  if (error == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000)
    return "the NVIDIA driver is too old: it is for CUDA " + number(driver) + ", and these kernels were built with CUDA " + number(runtime);
  return std::string("the NVIDIA driver does not work: ") + cudaGetErrorString(error);
}

void check(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError(); // clears the error, so that a later call does not report it again
  std::string reason;
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || error == cudaErrorInitializationError) reason = driver_failure();
  if (reason.empty()) reason = std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
  throw std::runtime_error(std::string("fastcl: ") + what + ": " + reason);
}

const Device &device(int index) {
  constexpr int MOST = 128;
  static Device known[MOST];
  static bool asked[MOST];
  static std::mutex mutex;
  if (index < 0 || index >= MOST) throw std::runtime_error("fastcl: no CUDA device " + std::to_string(index));
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked[index]) {
    Device d;
    d.processors = attribute(cudaDevAttrMultiProcessorCount, index);
    d.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    d.architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    known[index] = d;
    asked[index] = true;
  }
  return known[index];
}

void require_current(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device)
    throw std::runtime_error("fastcl: expected rows on the current CUDA device " + std::to_string(current) + ", got rows on " +
                             std::to_string(device));
}

void launch_erased(const char *name, const void *kernel, void **arguments, const Launch &launch, const Where &where) {
  if (launch.blocks > INT32_MAX || launch.blocks_y > 65535) throw std::runtime_error(std::string("fastcl: ") + name + ": too many blocks");
  if (launch.shared > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared)), name);
  const dim3 grid(unsigned(launch.blocks), unsigned(launch.blocks_y)), block(unsigned(launch.threads));
  check(launch.cooperative ? cudaLaunchCooperativeKernel(kernel, grid, block, arguments, size_t(launch.shared), cudaStream_t(where.stream))
                           : cudaLaunchKernel(kernel, grid, block, arguments, size_t(launch.shared), cudaStream_t(where.stream)),
        name);
}

#endif

int processors(int index) { return device(index).processors; }

} // namespace fastcl::cuda
