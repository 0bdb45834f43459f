/* The CUDA runtime without a card: device memory is the host's, kernels and events do nothing. */
#include <stdlib.h>
#include <string.h>

typedef size_t Size;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

/* The fields of CUDA 13's cudaDeviceProp that the provider reads, at their offsets in its header. */
int cudaGetDeviceProperties(char *properties, int device) {
  static const struct { int offset; long value; } fields[] = {
      {288, 80L << 30},  /* totalGlobalMem */
      {296, 49152},      /* sharedMemPerBlock */
      {304, 65536},      /* regsPerBlock */
      {308, 32},         /* warpSize */
      {320, 1024},       /* maxThreadsPerBlock */
      {324, 1024}, {328, 1024}, {332, 64},             /* maxThreadsDim */
      {336, 2147483647}, {340, 65535}, {344, 65535},   /* maxGridSize */
      {360, 9}, {364, 0},                              /* major, minor */
      {384, 132},        /* multiProcessorCount */
      {604, 2048},       /* maxThreadsPerMultiProcessor */
  };
  memset(properties, 0, 1008);
  strcpy(properties, "stub");
  for (unsigned i = 0; i < sizeof fields / sizeof *fields; i++)
    memcpy(properties + fields[i].offset, &fields[i].value, fields[i].offset < 300 ? 8 : 4);
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;     /* threads per block */
    case 8: *value = 49152; break;    /* shared memory per block */
    case 10: *value = 32; break;      /* warp size */
    case 16: *value = 132; break;     /* multiprocessors */
    case 75: *value = 9; break;       /* compute capability, major */
    case 76: *value = 0; break;       /* minor */
    case 97: *value = 232448; break;  /* shared memory per block, opt in */
    default: *value = 1;
  }
  return 0;
}

int cudaMemGetInfo(Size *available, Size *total) {
  *available = 70UL << 30;
  *total = 80UL << 30;
  return 0;
}

/* Memory starts as zeros, so that every run gives the same (wrong) numbers and counts of nothing. */
static int allocate(void **memory, Size size) {
  if (posix_memalign(memory, 512, size ? size : 1)) return 2; /* cudaErrorMemoryAllocation */
  memset(*memory, 0, size);
  return 0;
}
int cudaMalloc(void **memory, Size size) { return allocate(memory, size); }
int cudaMallocHost(void **memory, Size size) { return allocate(memory, size); }
int cudaHostAlloc(void **memory, Size size, unsigned flags) { return allocate(memory, size); }
int cudaMallocFromPoolAsync(void **memory, Size size, void *pool, void *stream) {
  return allocate(memory, size);
}
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaFreeAsync(void *memory, void *stream) { free(memory); return 0; }

int cudaMemcpy(void *to, const void *from, Size size, int kind) {
  memmove(to, from, size);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, Size size, int kind, void *stream) {
  memmove(to, from, size);
  return 0;
}
int cudaMemcpy2DAsync(char *to, Size to_pitch, const char *from, Size from_pitch, Size width,
                      Size height, int kind, void *stream) {
  for (Size row = 0; row < height; row++)
    memmove(to + row * to_pitch, from + row * from_pitch, width);
  return 0;
}
int cudaMemset(void *memory, int value, Size size) { memset(memory, value, size); return 0; }
int cudaMemsetAsync(void *memory, int value, Size size, void *stream) {
  memset(memory, value, size);
  return 0;
}
int cudaMemPoolGetAttribute(void *pool, int attribute, long *value) { *value = 0; return 0; }
int cudaPointerGetAttributes(int *attributes, const void *memory) {
  memset(attributes, 0, 32);
  attributes[0] = 2; /* cudaMemoryTypeDevice */
  return 0;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  function(data);
  return 0;
}
int cudaFuncGetAttributes(char *attributes, const void *function) {
  static const int values[] = {1024, 32, 90, 90}; /* threads per block, registers, versions */
  memset(attributes, 0, 64);
  memcpy(attributes + 24, values, sizeof values);
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 8; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *result) {
  *function = 0;
  if (result) *result = 1; /* cudaDriverEntryPointSymbolNotFound */
  return 0;
}
int cudaLibraryLoadData(void) { return 1; }
int cudaLibraryGetKernel(void) { return 1; }

int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  *milliseconds = 1;
  return 0;
}
const char *cudaGetErrorName(int error) { return "stub error"; }
const char *cudaGetErrorString(int error) { return "stub error"; }
