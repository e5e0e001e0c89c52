/* A stand-in for the CUDA driver, for tests of the launch path on machines without one. It is built by driver.py beside it
 * and found only by a process whose LD_LIBRARY_PATH names the folder that it was built into.
 *
 * It has two devices whose memory is the host's. Cubins are looked into as far as a driver must: whether they are whole,
 * which SM they are for, which kernels are in them and how large their parameter blocks are. A launch is handed to a
 * function of the test's. Each call can be told to fail, once or for ever. Streams are numbers: the upper ones are the
 * second device's; handles of contexts, libraries and kernels are pointers of ours. */
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801, STREAM_CAPTURE_IMPLICIT = 906,
};
#define DEVICES 2
#define SECOND_DEVICE_STREAM 0x10000
#define EXPORT __attribute__((visibility("default")))

typedef int Result;

/* ---- what tests say and ask ---------------------------------------------------------------------------------------------- */

typedef struct {
    const char* kernel;
    const void* parameters;
    uint64_t parameter_bytes, stream;
    uint32_t grid[3], block[3], shared_bytes, device, overlapping;
} Launch;

static struct { char call[64]; Result code; int sticky; } order;
static Result stuck;                       /* every call fails so after a sticky error */
static int sm[DEVICES] = {120, 120}, capturing;
static Result (*on_launch)(const Launch*);
static char calls[1 << 16];

EXPORT void standin_fail(const char* call, Result code, int sticky) {
    strncpy(order.call, call, sizeof order.call - 1);
    order.code = code;
    order.sticky = sticky;
}
EXPORT void standin_recover(void) { stuck = SUCCESS; order.call[0] = 0; }
EXPORT void standin_set_sm(int device, int number) { sm[device] = number; }
EXPORT void standin_set_capturing(int status) { capturing = status; }
EXPORT void standin_on_launch(Result (*function)(const Launch*)) { on_launch = function; }
/* Names of the calls since the last time, a line each; launches are not among them. */
EXPORT const char* standin_calls(void) {
    static char since[sizeof calls];
    memcpy(since, calls, sizeof calls);
    calls[0] = 0;
    return since;
}

static Result begin(const char* call) {
    if (strncmp(call, "cuLaunch", 8) && strlen(calls) + strlen(call) + 2 < sizeof calls) strcat(strcat(calls, call), "\n");
    if (stuck) return stuck;
    if (order.call[0] && !strcmp(call, order.call)) {
        order.call[0] = 0;
        if (order.sticky) stuck = order.code;
        return order.code;
    }
    return SUCCESS;
}
#define BEGIN do { Result failure = begin(__func__); if (failure) return failure; } while (0)

/* ---- devices and contexts ------------------------------------------------------------------------------------------------ */

typedef struct { int device; } Context;
static Context contexts[DEVICES] = {{0}, {1}};
static __thread Context* current;

static Result cuInit(unsigned flags) { BEGIN; return flags ? INVALID_VALUE : SUCCESS; }
static Result cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
static Result cuDeviceGetCount(int* count) { BEGIN; *count = DEVICES; return SUCCESS; }
static Result cuDeviceGet(int* device, int ordinal) {
    BEGIN;
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}
static Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    BEGIN;
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    *value = attribute == 75 ? sm[device] / 10 : attribute == 76 ? sm[device] % 10 : 0;
    return SUCCESS;
}
static Result cuDevicePrimaryCtxRetain(Context** context, int device) { BEGIN; *context = &contexts[device]; return SUCCESS; }
static Result cuCtxGetCurrent(Context** context) { BEGIN; *context = current; return SUCCESS; }
static Result cuCtxSetCurrent(Context* context) { BEGIN; current = context; return SUCCESS; }

/* ---- memory -------------------------------------------------------------------------------------------------------------- */

static Result cuMemAlloc(uint64_t* address, size_t bytes) {
    BEGIN;
    *address = (uint64_t)aligned_alloc(512, (bytes + 511) / 512 * 512);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
static Result cuMemFree(uint64_t address) { free((void*)address); return SUCCESS; }
static Result cuMemcpyHtoD(uint64_t to, const void* from, size_t bytes) { BEGIN; memcpy((void*)to, from, bytes); return SUCCESS; }
static Result cuMemcpyDtoH(void* to, uint64_t from, size_t bytes) { BEGIN; memcpy(to, (void*)from, bytes); return SUCCESS; }

/* ---- cubins: libraries of kernels ---------------------------------------------------------------------------------------- */

typedef struct Kernel { struct Library* library; char name[256]; uint64_t parameter_bytes; struct Kernel* next; } Kernel;
typedef struct Library { int sm; Kernel* kernels; } Library;

static const Elf64_Shdr* section(const uint8_t* image, const char* prefix, const char* name) {
    const Elf64_Ehdr* elf = (const void*)image;
    const Elf64_Shdr* sections = (const void*)(image + elf->e_shoff);
    const char* names = (const char*)image + sections[elf->e_shstrndx].sh_offset;
    for (int i = 0; i < elf->e_shnum; ++i) {
        const char* found = names + sections[i].sh_name;
        if (!strncmp(found, prefix, strlen(prefix)) && (!name || !strcmp(found + strlen(prefix), name))) return &sections[i];
    }
    return NULL;
}

/* .nv.info is a list of (format, attribute, 16 bits), followed by so many bytes if the format is 4. */
static uint64_t parameter_bytes(const uint8_t* image, const char* kernel) {
    const Elf64_Shdr* info = section(image, ".nv.info.", kernel);
    for (uint64_t at = 0; info && at + 4 <= info->sh_size;) {
        const uint8_t* entry = image + info->sh_offset + at;
        const uint16_t value = entry[2] | entry[3] << 8;
        if (entry[0] == 3 && entry[1] == 0x19) return value;
        at += entry[0] == 4 ? 4 + value : 4;
    }
    return 0;
}

static Result cuLibraryUnload(Library* library) {
    BEGIN;
    while (library->kernels) {
        Kernel* kernel = library->kernels;
        library->kernels = kernel->next;
        free(kernel);
    }
    free(library);
    return SUCCESS;
}

static Result cuLibraryLoadData(Library** library, const uint8_t* image, void* o, void** v, unsigned n, void* p, void** w,
                                unsigned m) {
    BEGIN;
    const Elf64_Ehdr* elf = (const void*)image;
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG) || elf->e_machine != EM_CUDA || elf->e_shentsize != sizeof(Elf64_Shdr)) {
        return INVALID_IMAGE;
    }
    const int built_for = elf->e_flags >> 8 & 0xff, ours = sm[current ? current->device : 0];
    if (built_for / 10 != ours / 10 || built_for > ours) return NO_BINARY_FOR_GPU;
    *library = calloc(1, sizeof(Library));
    (*library)->sm = built_for;
    const Elf64_Shdr* sections = (const void*)(image + elf->e_shoff);
    const char* names = (const char*)image + sections[elf->e_shstrndx].sh_offset;
    for (int i = 0; i < elf->e_shnum; ++i) {
        const char* name = names + sections[i].sh_name;
        if (strncmp(name, ".text.", 6)) continue;
        Kernel* kernel = calloc(1, sizeof(Kernel));
        kernel->library = *library;
        strncpy(kernel->name, name + 6, sizeof kernel->name - 1);
        kernel->parameter_bytes = parameter_bytes(image, kernel->name);
        kernel->next = (*library)->kernels;
        (*library)->kernels = kernel;
    }
    return SUCCESS;
}

static Result cuLibraryGetKernel(Kernel** found, Library* library, const char* name) {
    BEGIN;
    for (Kernel* kernel = library->kernels; kernel; kernel = kernel->next) {
        if (!strcmp(kernel->name, name)) {
            *found = kernel;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

/* ---- streams and launches ------------------------------------------------------------------------------------------------ */

static Result cuStreamIsCapturing(uint64_t stream, int* status) {
    BEGIN;
    *status = 0;
    if (capturing && !stream) return STREAM_CAPTURE_IMPLICIT;   /* the default stream, while another one is captured */
    *status = capturing;
    return SUCCESS;
}

static Result launch(Kernel* kernel, Launch* launch, void** parameters) {
    if (!current) return INVALID_CONTEXT;
    launch->device = launch->stream >= SECOND_DEVICE_STREAM;
    if (launch->stream && (int)launch->device != current->device) return INVALID_HANDLE;
    launch->device = current->device;
    if (kernel->library->sm / 10 != sm[current->device] / 10) return NO_BINARY_FOR_GPU;
    for (int i = 0; i < 3; ++i) {
        if (!launch->grid[i] || !launch->block[i]) return INVALID_VALUE;
    }
    if (launch->grid[1] > 65535 || launch->block[0] * launch->block[1] * launch->block[2] > 1024) return INVALID_VALUE;
    launch->kernel = kernel->name;
    launch->parameters = parameters[0];     /* kernels here take one */
    launch->parameter_bytes = kernel->parameter_bytes;
    Result result = on_launch ? on_launch(launch) : SUCCESS;
    if (result == ILLEGAL_ADDRESS) stuck = result;
    return result;
}

static Result cuLaunchKernel(Kernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                             unsigned shared_bytes, uint64_t stream, void** parameters, void** extra) {
    BEGIN;
    Launch it = {.stream = stream, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared_bytes = shared_bytes};
    return extra ? NOT_SUPPORTED : launch(kernel, &it, parameters);
}

/* CUlaunchConfig and CUlaunchAttribute as in cuda.h. */
typedef struct { int id; char pad[4]; union { char bytes[64]; int allowed; } value; } Attribute;
typedef struct { unsigned grid[3], block[3], shared_bytes; uint64_t stream; Attribute* attributes; unsigned count; } Config;

static Result cuLaunchKernelEx(const Config* config, Kernel* kernel, void** parameters, void** extra) {
    BEGIN;
    Launch it = {.stream = config->stream, .shared_bytes = config->shared_bytes};
    memcpy(it.grid, config->grid, sizeof it.grid);
    memcpy(it.block, config->block, sizeof it.block);
    for (unsigned i = 0; i < config->count; ++i) {
        if (config->attributes[i].id != 6) return NOT_SUPPORTED;   /* programmatic stream serialization */
        it.overlapping = config->attributes[i].value.allowed;
    }
    return extra ? NOT_SUPPORTED : launch(kernel, &it, parameters);
}

/* ---- words --------------------------------------------------------------------------------------------------------------- */

static Result cuGetErrorString(Result error, const char** words) {
    switch (error) {
        case OUT_OF_MEMORY: *words = "out of memory"; break;
        case NOT_INITIALIZED: *words = "initialization error"; break;
        case INVALID_DEVICE: *words = "invalid device ordinal"; break;
        case INVALID_IMAGE: *words = "device kernel image is invalid"; break;
        case INVALID_CONTEXT: *words = "invalid device context"; break;
        case NO_BINARY_FOR_GPU: *words = "no kernel image is available for execution on the device"; break;
        case INVALID_HANDLE: *words = "invalid resource handle"; break;
        case NOT_FOUND: *words = "named symbol not found"; break;
        case ILLEGAL_ADDRESS: *words = "an illegal memory access was encountered"; break;
        default: *words = NULL; return INVALID_VALUE;
    }
    return SUCCESS;
}

/* ---- the way in: cuda.bindings asks for every function by name -------------------------------------------------------------- */

#define ENTRY(name) {#name, (void*)name}
static const struct { const char* name; void* function; } table[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxGetCurrent), ENTRY(cuCtxSetCurrent), ENTRY(cuMemAlloc), ENTRY(cuMemFree),
    ENTRY(cuMemcpyHtoD), ENTRY(cuMemcpyDtoH), ENTRY(cuLibraryLoadData), ENTRY(cuLibraryUnload), ENTRY(cuLibraryGetKernel),
    ENTRY(cuStreamIsCapturing), ENTRY(cuLaunchKernel), ENTRY(cuLaunchKernelEx), ENTRY(cuGetErrorString),
};

EXPORT Result cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    for (unsigned i = 0; i < sizeof table / sizeof *table; ++i) {
        if (!strcmp(name, table[i].name)) {
            *function = table[i].function;
            return SUCCESS;
        }
    }
    *function = NULL;
    return NOT_FOUND;
}
