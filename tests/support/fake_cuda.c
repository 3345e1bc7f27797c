/* Stands for the CUDA driver, libcuda.so.1, where there is no GPU: launches are reported to `fake_recorder`. */
#include <stddef.h>
#include <stdint.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config; /* CUlaunchConfig */

void (*fake_recorder)(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, void *stream, void **parameters);
static void *current;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 232448, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)64, 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxSetCurrent(void *context) { return current = context, 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)64, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  static uintptr_t last = 64;
  return *function = (void *)(last += 64), 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error", 0; }
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t address) { return *data = address, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *stream) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c, unsigned shared, void *stream,
                   void **parameters, void **extra) {
  if (current == NULL || b != 1 || c != 1 || extra) return 1;
  fake_recorder(function, x, y, z, threads, shared, stream, parameters);
  return 0;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  if (config->count || extra) return 1; /* attributes, which `Launches` does not set */
  const unsigned *grid = config->grid, *block = config->block;
  return cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared, config->stream, parameters, extra);
}
