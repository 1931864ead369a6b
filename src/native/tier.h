/* The memory tier in C: entries, and the order in which they leave. `_memory.py` is the same in Python, and explains it. */

#ifndef CHEST_TIER_H
#define CHEST_TIER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <structmember.h>

#ifdef Py_GIL_DISABLED
#error "these paths rely on the interpreter's lock: without it the Python beside them is used"
#endif

#define N_CLASSES 16
#define FIRST N_CLASSES
#define PICKED (N_CLASSES + 1)
#define STUCK (N_CLASSES + 2)
#define N_LISTS (N_CLASSES + 3)

typedef struct Link {
    struct Link *prev, *next;
} Link;

typedef struct {
    PyObject_HEAD
    PyObject *key, *value, *baseline, *stored;
    long long size, epoch, floor, key_bytes, round;
    unsigned long long seq, version;
    Link link; /* while it is in a list, the list holds a reference to it */
    short list, f;
    char dirty, hot, alive, lent, fresh;
} Entry;

typedef struct {
    PyObject_HEAD
    PyObject *entries, *on_second_chance, *weakrefs;
    long long limit, floor, values, bookkeeping, usage, stuck_bytes, round;
    long long hit_fresh; /* of the fresh entries that came to a head, the share that had been hit, of 2**16 */
    long long free; /* of the bookkeeping, what does not count */
    long long heads[N_CLASSES + 1];
    Link ends[N_LISTS];
    char busy; /* looking up a key that it adds or takes out */
} Tier;

extern PyTypeObject Entry_Type, Tier_Type;
extern long long entry_bytes; /* what an entry takes beside its key and value */

PyObject *simple_name(PyObject *key);
int is_fixed(PyObject *value);
int is_container(PyObject *value);
PyObject *picture_of(PyObject *value);
long long bytes_of_baseline(PyObject *baseline);
int picture_matches(PyObject *picture, PyObject *value);
int held_at_a_glance(Entry *entry);
int holders_of(Entry *entry);
int size_of_members(PyObject *value, PyObject *quick, PyObject *leaves, long long *size);
Entry *entry_new(PyObject *key, PyObject *value, long long size);
int tier_add(Tier *self, Entry *entry);
int tier_ready(PyObject *module);

#endif
