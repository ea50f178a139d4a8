/* The frozen CNI binary: starts the interpreter as far as it is needed and runs cni/__main__.py.
 *
 * `modules.h` is written by cni/freeze.py: the array `modules` holds the compiled modules, `order` the names in the
 * order in which they must be there. Nothing is read from the file system.
 */
#include <Python.h>
#include <sys/mman.h>
#include <unistd.h>

#include "modules.h"

#define FAILED 1

PyObject *PyMarshal_Init(void);
PyObject *PyInit__imp(void);
PyObject *PyInit__socket(void);
PyObject *PyInit__thread(void);
PyObject *PyInit__weakref(void);
PyObject *PyInit_errno(void);
PyObject *PyInit_fcntl(void);
PyObject *PyInit_posix(void);
PyObject *_PyWarnings_Init(void);

/* The modules in C, instead of the library's own table: what is not named here is not linked. The first seven are what
 * the interpreter itself starts with. */
struct _inittab _PyImport_Inittab[] = {
    {"builtins", NULL},
    {"sys", NULL},
    {"marshal", PyMarshal_Init},
    {"_imp", PyInit__imp},
    {"_thread", PyInit__thread},
    {"_warnings", _PyWarnings_Init},
    {"_weakref", PyInit__weakref},
    {"_socket", PyInit__socket},
    {"errno", PyInit_errno},
    {"fcntl", PyInit_fcntl},
    {"posix", PyInit_posix},
    {NULL, NULL},
};

static const char broken[] = "{\"code\": 100, \"msg\": \"podwall's interpreter did not start\"}\n";

static int fail(void)
{
    if (write(STDOUT_FILENO, broken, sizeof broken - 1) < 0)
        return FAILED + 1;
    return FAILED;
}

/* Most of the data segment is written during the start: to have it at once instead of page by page saves a tenth of
 * the processor time. Linux 5.14; older ones refuse, which does not matter. */
static void populate_data(void)
{
#ifdef MADV_POPULATE_WRITE
    extern char __data_start[], _end[];
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = (uintptr_t)__data_start & ~(page - 1);
    madvise((void *)first, (uintptr_t)_end - first, MADV_POPULATE_WRITE);
#endif
}

/* The interpreter's own phase: builtins, sys and the frozen importer. The second phase would look for a prefix, load
 * codecs and open text streams, a third of the whole start; the binary works on descriptors and bytes. */
static PyStatus start(void)
{
    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        return status;

    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    config._init_main = 0;
    config.install_signal_handlers = 0;
    config.site_import = 0;
    config.write_bytecode = 0;
    config.module_search_paths_set = 1;
    status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    return status;
}

int main(void)
{
    populate_data();
    PyImport_FrozenModules = modules;
    if (PyStatus_Exception(start()))
        return fail();
    PyGC_Disable();
    for (const char *const *name = order; *name; name++)
        if (PyImport_ImportFrozenModule(*name) != 1) { /* __main__ is the last and ends the process */
            PyErr_Print();
            return fail();
        }
    return fail();
}
