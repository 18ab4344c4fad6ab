/* What edgedeploy calls of NVIDIA's driver (-DDRIVER) and of CUDA's runtime (-DRUNTIME), on a machine without a GPU.
 *
 * The GPU's memory is the process's, streams do everything at once, kernels are host functions (cudaLaunchHostFunc), and
 * a captured graph holds them and the copies in order. Names, arguments and error numbers are those of cuda.h and of
 * cuda_runtime_api.h; a handle that was never given out is refused.
 *
 * With -DCUDA_11 the runtime is that of CUDA 11.0: cudaGraphInstantiate has five arguments, and how a thread waits cannot
 * be changed once a stream was made. By environment:
 *
 *   EMULATED_CUDA_DEVICES         GPUs, 1 by default; 0: the driver is here, a GPU is not
 *   EMULATED_CUDA_DRIVER          what the driver serves, 12060 by default; an older one refuses the runtime (error 35)
 *   EMULATED_COMPUTE_CAPABILITY   8.7 by default
 *   EMULATED_INTEGRATED           1 by default: the GPU has the system's memory, as a Jetson's; 0: its own
 *   EMULATED_MEMORY               bytes of the GPU's memory, 8 GiB by default
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INSUFFICIENT_DRIVER = 35, NO_DEVICE = 100, INVALID_HANDLE = 400,
       NOT_READY = 600, SET_ON_ACTIVE_PROCESS = 708, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903 };

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static int devices(void) { return (int)number("EMULATED_CUDA_DEVICES", 1); }
static int driver_version(void) { return (int)number("EMULATED_CUDA_DRIVER", 12060); }

static const char *words(int code) {
    switch (code) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INSUFFICIENT_DRIVER: return "CUDA driver version is insufficient for CUDA runtime version";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case INVALID_HANDLE: return "invalid resource handle";
    case NOT_READY: return "device not ready";
    case SET_ON_ACTIVE_PROCESS: return "cannot set while device is active in this process";
    case NOT_SUPPORTED: return "operation not supported";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_UNMATCHED: return "the capture was not initiated in this stream";
    default: return "unrecognized error code";
    }
}

#ifdef DRIVER
#define INTEGRATED 18
#define CAPABILITY_MAJOR 75
#define CAPABILITY_MINOR 76

static int initialised;

int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (devices() < 1) return NO_DEVICE;
    initialised = 1;
    return SUCCESS;
}

int cuDriverGetVersion(int *version) { *version = driver_version(); return SUCCESS; }

int cuDeviceGetCount(int *count) {
    if (!initialised) return 3; /* CUDA_ERROR_NOT_INITIALIZED */
    *count = devices();
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= devices()) return 101; /* CUDA_ERROR_INVALID_DEVICE */
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    snprintf(name, (size_t)length, "Emulated GPU");
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)number("EMULATED_MEMORY", 8L << 30);
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *text = getenv("EMULATED_COMPUTE_CAPABILITY");
    int major = 8, minor = 7;
    (void)device;
    if (text && sscanf(text, "%d.%d", &major, &minor) != 2) return INVALID_VALUE;
    if (attribute == CAPABILITY_MAJOR) *value = major;
    else if (attribute == CAPABILITY_MINOR) *value = minor;
    else if (attribute == INTEGRATED) *value = (int)number("EMULATED_INTEGRATED", 1);
    else return INVALID_VALUE;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &initialised; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return SUCCESS; }
int cuCtxSetCurrent(void *context) { return context == &initialised ? SUCCESS : 201; } /* CUDA_ERROR_INVALID_CONTEXT */

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *free_bytes = *total = (size_t)number("EMULATED_MEMORY", 8L << 30);
    return SUCCESS;
}

int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
    return device == 0 && (flags == 1 || flags == 4) ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxSetFlags(int device, unsigned flags) { return cuDevicePrimaryCtxSetFlags_v2(device, flags); }

int cuGetErrorString(int code, const char **text) { *text = words(code); return SUCCESS; }
int cuGetErrorName(int code, const char **text) { *text = words(code); return SUCCESS; }
#endif

#ifdef RUNTIME
typedef void (*function)(void *);
enum kind { STREAM = 0x5354, EVENT = 0x4556, GRAPH = 0x4752, EXECUTABLE = 0x4558, FREED = 0 };
/* One thing that a stream is given to do: a copy, or a host function. */
struct work { void *to; const void *from; size_t size; function call; void *data; };
struct graph { enum kind kind; int count, room; struct work *works; };
struct stream { enum kind kind; struct graph *capturing; int is_invalid; };
struct event { enum kind kind; int is_recorded; struct timespec time; };

static int last_error, is_active;
static unsigned flags_now;
static size_t used;

static int said(int code) { if (code) last_error = code; return code; }
static size_t memory(void) { return (size_t)number("EMULATED_MEMORY", 8L << 30); }

static void work_off(const struct work *work) {
    if (work->call) work->call(work->data);
    else memmove(work->to, work->from, work->size);
}

static int give(struct stream *stream, struct work work) {
    struct graph *graph;
    if (!stream || stream->kind != STREAM) return said(INVALID_HANDLE);
    if (stream->is_invalid) return said(CAPTURE_INVALIDATED);
    graph = stream->capturing;
    if (!graph) { work_off(&work); return SUCCESS; }
    if (graph->count == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 8;
        graph->works = realloc(graph->works, (size_t)graph->room * sizeof work);
    }
    graph->works[graph->count++] = work;
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    *count = 0;
    if (driver_version() < 11040) return said(INSUFFICIENT_DRIVER);
    if (devices() < 1) return said(NO_DEVICE);
    *count = devices();
    return SUCCESS;
}

int cudaRuntimeGetVersion(int *version) { *version = 12060; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = driver_version(); return SUCCESS; }
const char *cudaGetErrorString(int code) { return words(code); }
int cudaGetLastError(void) { int code = last_error; last_error = SUCCESS; return code; }

int cudaSetDeviceFlags(unsigned flags) {
    if (flags != 0 && flags != 1 && flags != 2 && flags != 4) return said(INVALID_VALUE);
#ifdef CUDA_11
    if (is_active) return said(SET_ON_ACTIVE_PROCESS);
#endif
    flags_now = flags;
    return SUCCESS;
}

int cudaGetDeviceFlags(unsigned *flags) { *flags = flags_now | 8; return SUCCESS; } /* 8: cudaDeviceMapHost, always set */

/* The size stands before the memory, 256 bytes being what cudaMalloc promises to align to. */
int cudaMalloc(void **address, size_t size) {
    char *made;
    *address = NULL;
    if (used + size > memory() || !(made = aligned_alloc(256, 256 + (size + 255) / 256 * 256))) return said(OUT_OF_MEMORY);
    memset(made + 256, 0xA5, size); /* nobody may count on zeros */
    *(size_t *)made = size;
    used += size;
    *address = made + 256;
    return SUCCESS;
}

int cudaFree(void *address) {
    if (!address) return SUCCESS;
    used -= *(size_t *)((char *)address - 256);
    memset(address, 0x5A, *(size_t *)((char *)address - 256));
    free((char *)address - 256);
    return SUCCESS;
}

int cudaHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    *address = malloc(size);
    return *address ? SUCCESS : said(OUT_OF_MEMORY);
}

int cudaFreeHost(void *address) { free(address); return SUCCESS; }

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = memory();
    *free_bytes = memory() - used;
    return SUCCESS;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, struct stream *stream) {
    struct work work = {to, from, size, NULL, NULL};
    if (!to || !from || kind < 0 || kind > 4) return said(INVALID_VALUE);
    return give(stream, work);
}

int cudaLaunchHostFunc(struct stream *stream, function call, void *data) {
    struct work work = {NULL, NULL, 0, call, data};
    return give(stream, work);
}

int cudaStreamCreate(struct stream **stream) {
    is_active = 1;
    *stream = calloc(1, sizeof **stream);
    (*stream)->kind = STREAM;
    return SUCCESS;
}

int cudaStreamSynchronize(struct stream *stream) {
    if (!stream || stream->kind != STREAM) return said(INVALID_HANDLE);
    if (!stream->capturing) return SUCCESS;
    stream->is_invalid = 1;
    return said(CAPTURE_UNSUPPORTED);
}

int cudaStreamDestroy(struct stream *stream) {
    if (!stream || stream->kind != STREAM) return said(INVALID_HANDLE);
    stream->kind = FREED; /* kept, so that a use after it is found */
    return SUCCESS;
}

int cudaStreamIsCapturing(struct stream *stream, int *status) {
    *status = stream->is_invalid ? 2 : stream->capturing != NULL;
    return SUCCESS;
}

int cudaEventCreate(struct event **event) {
    *event = calloc(1, sizeof **event);
    (*event)->kind = EVENT;
    return SUCCESS;
}

int cudaEventRecord(struct event *event, struct stream *stream) {
    if (!event || event->kind != EVENT || !stream || stream->kind != STREAM) return said(INVALID_HANDLE);
    event->is_recorded = 1;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return SUCCESS;
}

int cudaEventElapsedTime(float *ms, struct event *start, struct event *end) {
    if (!start || !end || start->kind != EVENT || end->kind != EVENT) return said(INVALID_HANDLE);
    if (!start->is_recorded || !end->is_recorded) return said(INVALID_HANDLE);
    *ms = (float)((double)(end->time.tv_sec - start->time.tv_sec) * 1e3
                  + (double)(end->time.tv_nsec - start->time.tv_nsec) * 1e-6);
    return SUCCESS;
}

int cudaEventDestroy(struct event *event) {
    if (!event || event->kind != EVENT) return said(INVALID_HANDLE);
    event->kind = FREED;
    return SUCCESS;
}

int cudaStreamBeginCapture(struct stream *stream, int mode) {
    if (!stream || stream->kind != STREAM) return said(INVALID_HANDLE);
    if (mode < 0 || mode > 2 || stream->capturing) return said(INVALID_VALUE);
    stream->capturing = calloc(1, sizeof *stream->capturing);
    stream->capturing->kind = GRAPH;
    stream->is_invalid = 0;
    return SUCCESS;
}

int cudaStreamEndCapture(struct stream *stream, struct graph **graph) {
    int is_invalid = stream->is_invalid;
    *graph = NULL;
    if (!stream->capturing) return said(CAPTURE_UNMATCHED);
    if (!is_invalid) *graph = stream->capturing;
    stream->capturing = NULL;
    stream->is_invalid = 0;
    return is_invalid ? said(CAPTURE_INVALIDATED) : SUCCESS;
}

#ifdef CUDA_11 /* where this function came with 11.4 only */
static
#endif
int cudaGraphInstantiateWithFlags(struct graph **executable, struct graph *graph, unsigned long long flags) {
    if (!graph || graph->kind != GRAPH || flags) return said(INVALID_VALUE);
    *executable = calloc(1, sizeof **executable);
    **executable = *graph;
    (*executable)->kind = EXECUTABLE;
    (*executable)->works = malloc((size_t)graph->count * sizeof *graph->works + 1);
    memcpy((*executable)->works, graph->works, (size_t)graph->count * sizeof *graph->works);
    return SUCCESS;
}

#ifdef CUDA_11
int cudaGraphInstantiate(struct graph **executable, struct graph *graph, void **node, char *log, size_t size) {
    if (node || log || size) return said(INVALID_VALUE);
    return cudaGraphInstantiateWithFlags(executable, graph, 0);
}
#endif

int cudaGraphLaunch(struct graph *executable, struct stream *stream) {
    int i;
    if (!executable || executable->kind != EXECUTABLE) return said(INVALID_HANDLE);
    for (i = 0; i < executable->count; i++) {
        int code = give(stream, executable->works[i]);
        if (code) return code;
    }
    return SUCCESS;
}

int cudaGraphDestroy(struct graph *graph) {
    if (!graph || graph->kind != GRAPH) return said(INVALID_VALUE);
    graph->kind = FREED;
    return SUCCESS;
}

int cudaGraphExecDestroy(struct graph *executable) {
    if (!executable || executable->kind != EXECUTABLE) return said(INVALID_VALUE);
    executable->kind = FREED;
    return SUCCESS;
}
#endif
