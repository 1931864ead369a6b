/* Entries and the tier. What is done in which order, and why, stands in `_memory.py`: this follows it step by step.

   Two things are easier here. Nothing interrupts a C function, so it need not finish without calls. And an entry in a list is
   found from its link, so that the ends of the lists are links and no entries. What is as careful as in Python: whenever a
   reference is dropped, code of the user's may run and come back to the tier, so it is whole by then. What is more careful,
   since a link that leads nowhere would be a crash: while a key is looked up, which may run such code too, nothing is added. */

#include "tier.h"

#define MAX_USES 4
#define SECOND_CHANCES 16
#define BATCH 512
#define BREAK_EVEN 20000
#define FREE_BYTES (64 * 1024)
#define ONE (1 << 16) /* a share of 1 */
#define SOON (7 * ONE / 16)
#define WINDOW 8
#define NEVER ((long long)1 << 62)
#define LARGEST ((long long)1 << 56) /* sizes are cut here, so that sums of a few do not overflow */

#define ENTRY_OF(where) ((Entry *)((char *)(where) - offsetof(Entry, link)))

long long entry_bytes = 0;

static const long long N_VALUES[N_CLASSES + 1] = {1,    2,    4,    8,    16,   32,   64,    128,   256,
                                                  512,  1024, 2048, 4096, 8192, 16384, 32768, -NEVER};

/* --- entries */

static int
is_atomic(PyObject *o)
{
    return o == Py_None || PyUnicode_CheckExact(o) || PyBytes_CheckExact(o) || PyLong_CheckExact(o) || PyFloat_CheckExact(o) ||
           PyBool_Check(o);
}

Entry *
entry_new(PyObject *key, PyObject *value, long long size)
{
    Entry *self = PyObject_GC_New(Entry, &Entry_Type);
    if (self == NULL) {
        return NULL;
    }
    self->key = Py_NewRef(key);
    self->value = Py_NewRef(value);
    self->baseline = Py_NewRef(Py_None);
    self->stored = Py_NewRef(Py_None);
    self->size = size;
    self->epoch = self->floor = self->key_bytes = self->round = 0;
    self->seq = self->version = 0;
    self->link.prev = self->link.next = NULL;
    self->list = -1;
    self->f = 0;
    self->dirty = self->hot = self->alive = self->lent = self->fresh = 0;
    if (!(is_atomic(key) && is_atomic(value))) { /* else it is part of no cycle, and the collector has less to look at */
        PyObject_GC_Track((PyObject *)self);
    }
    return self;
}

/* A number of bytes, cut at LARGEST; -1 with an exception set. */
static long long
as_size(PyObject *number)
{
    int overflow;
    long long size = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (size == -1 && !overflow) {
        return PyErr_Occurred() ? -1 : -LARGEST;
    }
    return overflow > 0 || size > LARGEST ? LARGEST : overflow < 0 || size < -LARGEST ? -LARGEST : size;
}

static PyObject *
Entry_new(PyTypeObject *Py_UNUSED(type), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"key",  "value",    "size",  "dirty",  "seq",     "epoch",
                            "lent", "baseline", "fresh", "stored", "version", NULL};
    PyObject *key, *value, *size_object, *baseline = Py_None, *stored = Py_None;
    int dirty = 0, lent = 0, fresh = 0;
    unsigned long long seq = 0, version = 0;
    long long epoch = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|pKLpOpOK:Entry", names, &key, &value, &size_object, &dirty, &seq, &epoch,
                                     &lent, &baseline, &fresh, &stored, &version)) {
        return NULL;
    }
    long long size = as_size(size_object);
    if (size == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Entry *self = entry_new(key, value, size);
    if (self != NULL) {
        self->dirty = dirty;
        self->seq = seq;
        self->epoch = epoch;
        self->lent = lent;
        Py_SETREF(self->baseline, Py_NewRef(baseline));
        self->fresh = fresh;
        Py_SETREF(self->stored, Py_NewRef(stored));
        self->version = version;
    }
    return (PyObject *)self;
}

static int
Entry_traverse(Entry *self, visitproc visit, void *arg)
{
    Py_VISIT(self->key);
    Py_VISIT(self->value);
    Py_VISIT(self->baseline);
    Py_VISIT(self->stored);
    return 0;
}

static int
Entry_clear(Entry *self)
{
    /* Not the key, which is immutable and may be needed to take the entry out of a dict. None is ever missing: a tier that is
       being collected may still be asked. */
    Py_SETREF(self->value, Py_NewRef(Py_None));
    Py_SETREF(self->baseline, Py_NewRef(Py_None));
    Py_SETREF(self->stored, Py_NewRef(Py_None));
    return 0;
}

static void
Entry_dealloc(Entry *self)
{
    PyObject_GC_UnTrack(self);
    Py_TRASHCAN_BEGIN(self, Entry_dealloc)
    Py_CLEAR(self->value);
    Py_CLEAR(self->baseline);
    Py_CLEAR(self->stored);
    Py_CLEAR(self->key);
    PyObject_GC_Del(self);
    Py_TRASHCAN_END
}

static PyObject *
Entry_repr(Entry *self)
{
    return PyUnicode_FromFormat("<Entry %R, %lld bytes, f=%d %s%s%s%s>", self->key, self->size, (int)self->f,
                                self->alive ? "alive " : "", self->dirty ? "dirty " : "", self->hot ? "hot " : "",
                                self->lent ? "lent" : "");
}

static PyObject *
Entry_get_size(Entry *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(self->size);
}

static int
Entry_set_size(Entry *self, PyObject *number, void *Py_UNUSED(closure))
{
    if (number == NULL) {
        PyErr_SetString(PyExc_TypeError, "size cannot be deleted");
        return -1;
    }
    long long size = as_size(number);
    if (size == -1 && PyErr_Occurred()) {
        return -1;
    }
    self->size = size;
    return 0;
}

static PyObject *
Entry_get_stuck(Entry *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(self->round);
}

static PyGetSetDef Entry_getset[] = {
    {"size", (getter)Entry_get_size, (setter)Entry_set_size, NULL, NULL},
    {"stuck", (getter)Entry_get_stuck, NULL, NULL, NULL},
    {NULL},
};

static PyMemberDef Entry_members[] = {
    {"key", T_OBJECT_EX, offsetof(Entry, key), READONLY, NULL},
    {"value", T_OBJECT_EX, offsetof(Entry, value), READONLY, NULL},
    {"baseline", T_OBJECT_EX, offsetof(Entry, baseline), 0, NULL},
    {"stored", T_OBJECT_EX, offsetof(Entry, stored), 0, NULL},
    {"epoch", T_LONGLONG, offsetof(Entry, epoch), 0, NULL},
    {"version", T_ULONGLONG, offsetof(Entry, version), 0, NULL},
    {"seq", T_ULONGLONG, offsetof(Entry, seq), 0, NULL},
    {"key_bytes", T_LONGLONG, offsetof(Entry, key_bytes), READONLY, NULL},
    {"f", T_SHORT, offsetof(Entry, f), 0, NULL},
    {"dirty", T_BOOL, offsetof(Entry, dirty), 0, NULL},
    {"hot", T_BOOL, offsetof(Entry, hot), 0, NULL},
    {"alive", T_BOOL, offsetof(Entry, alive), READONLY, NULL},
    {"lent", T_BOOL, offsetof(Entry, lent), 0, NULL},
    {"fresh", T_BOOL, offsetof(Entry, fresh), 0, NULL},
    {NULL},
};

PyTypeObject Entry_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "chest._native.Entry",
    .tp_doc = "One value in memory. The owner fills it, the tier queues it.",
    .tp_basicsize = sizeof(Entry),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = Entry_new,
    .tp_dealloc = (destructor)Entry_dealloc,
    .tp_traverse = (traverseproc)Entry_traverse,
    .tp_clear = (inquiry)Entry_clear,
    .tp_repr = (reprfunc)Entry_repr,
    .tp_members = Entry_members,
    .tp_getset = Entry_getset,
};

/* --- lists */

static int
class_of(const Tier *self, const Entry *entry)
{
    int uses = (self->hit_fresh > SOON ? 1 : entry->f) + entry->dirty;
    unsigned long long size = entry->size > 0 ? (unsigned long long)entry->size : 1;
    unsigned long long ratio = (unsigned long long)uses * (BREAK_EVEN + size) / size;
    int bits = 0;
    while (ratio) {
        ratio >>= 1;
        bits++;
    }
    return bits < N_CLASSES ? bits : N_CLASSES - 1;
}

static int
is_end(const Tier *self, const Link *where)
{
    return where >= self->ends && where < self->ends + N_LISTS;
}

static void
find_head(Tier *self, int i)
{
    if (i <= FIRST) {
        const Link *head = self->ends[i].next;
        self->heads[i] = head == &self->ends[i] ? NEVER : ENTRY_OF(head)->floor + N_VALUES[i];
    }
}

/* Take an entry out of its list; the list's reference is the caller's now. */
static void
unlink_entry(Tier *self, Entry *entry)
{
    Link *before = entry->link.prev, *after = entry->link.next;
    before->next = after;
    after->prev = before;
    entry->link.prev = entry->link.next = NULL;
    if (is_end(self, before)) {
        find_head(self, (int)(before - self->ends));
    }
    if (entry->round) {
        if (entry->round == self->round) {
            self->stuck_bytes -= entry->size;
        }
        entry->round = 0;
    }
}

/* Put an entry at the tail of list i, which takes over a reference of the caller's. */
static void
append_entry(Tier *self, Entry *entry, int i)
{
    Link *end = &self->ends[i], *tail = end->prev;
    if (i < N_CLASSES) {
        entry->floor = self->floor;
    }
    entry->list = (short)i;
    entry->link.prev = tail;
    entry->link.next = end;
    tail->next = end->prev = &entry->link;
    if (tail == end) {
        find_head(self, i);
    }
}

static void
move_entry(Tier *self, Entry *entry, int i)
{
    unlink_entry(self, entry);
    append_entry(self, entry, i);
}

static void
queue_again(Tier *self, Entry *entry)
{
    move_entry(self, entry, class_of(self, entry));
}

static void
splice_first(Tier *self, int i)
{
    Link *end = &self->ends[i], *first = &self->ends[FIRST];
    Link *head = end->next, *tail = end->prev;
    if (head != end) {
        head->prev = first->prev;
        first->prev->next = head;
        tail->next = first;
        first->prev = tail;
        end->prev = end->next = end;
        find_head(self, FIRST);
    }
}

static void
count_bytes(Tier *self, long long values, long long bookkeeping)
{
    self->values += values;
    self->bookkeeping += bookkeeping;
    self->usage = self->values + (self->bookkeeping > self->free ? self->bookkeeping - self->free : 0);
}

/* --- the tier */

static PyObject *
Tier_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"limit", "free_bytes", NULL};
    PyObject *limit;
    long long free_bytes = FREE_BYTES;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|L:MemoryTier", names, &limit, &free_bytes)) {
        return NULL;
    }
    long long bytes = as_size(limit);
    if (bytes == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Tier *self = (Tier *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->limit = bytes;
    self->free = free_bytes;
    self->round = 1;
    for (int i = 0; i < N_LISTS; i++) {
        self->ends[i].prev = self->ends[i].next = &self->ends[i];
        find_head(self, i);
    }
    self->on_second_chance = Py_NewRef(Py_None);
    self->entries = PyDict_New();
    if (self->entries == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int
Tier_traverse(Tier *self, visitproc visit, void *arg)
{
    for (int i = 0; i < N_LISTS; i++) {
        for (Link *at = self->ends[i].next; at != &self->ends[i]; at = at->next) {
            Py_VISIT(ENTRY_OF(at));
        }
    }
    Py_VISIT(self->entries);
    Py_VISIT(self->on_second_chance);
    return 0;
}

static int
empty(Tier *self)
{
    Link chain = {&chain, &chain};
    for (int i = 0; i < N_LISTS; i++) {
        Link *end = &self->ends[i];
        if (end->next != end) {
            end->next->prev = chain.prev;
            chain.prev->next = end->next;
            end->prev->next = &chain;
            chain.prev = end->prev;
            end->prev = end->next = end;
        }
        find_head(self, i);
    }
    self->floor = self->values = self->bookkeeping = self->usage = self->stuck_bytes = 0;
    for (Link *at = chain.next; at != &chain; at = at->next) {
        ENTRY_OF(at)->alive = 0;
        ENTRY_OF(at)->round = 0;
    }
    /* Values may run code of their own when they are freed: by then the tier is empty and whole. */
    if (self->entries != NULL) {
        PyDict_Clear(self->entries);
    }
    while (chain.next != &chain) {
        Entry *entry = ENTRY_OF(chain.next);
        chain.next = entry->link.next;
        chain.next->prev = &chain;
        entry->link.prev = entry->link.next = NULL;
        Py_DECREF(entry);
    }
    return 0;
}

static int
Tier_clear_refs(Tier *self)
{
    empty(self);
    Py_CLEAR(self->on_second_chance);
    return 0;
}

static void
Tier_dealloc(Tier *self)
{
    PyObject_GC_UnTrack(self);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs((PyObject *)self);
    }
    Tier_clear_refs(self);
    Py_CLEAR(self->entries);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static Py_ssize_t
Tier_length(Tier *self)
{
    return PyDict_GET_SIZE(self->entries);
}

static long long
bytes_of_key(PyObject *key)
{
    if (PyUnicode_IS_COMPACT_ASCII(key)) {
        return (long long)sizeof(PyASCIIObject) + PyUnicode_GET_LENGTH(key) + 1;
    }
    return 0;
}

static PyObject *getsizeof; /* sys.getsizeof */

static int
measure_key(Entry *entry)
{
    PyObject *key = entry->key;
    if (PyUnicode_CheckExact(key) && (entry->key_bytes = bytes_of_key(key))) {
        return 0;
    }
    PyObject *size = PyObject_CallOneArg(getsizeof, key);
    if (size == NULL) { /* a __sizeof__ of the user's that fails is no reason to refuse the key */
        if (!PyErr_ExceptionMatches(PyExc_Exception)) {
            return -1;
        }
        PyErr_Clear();
        entry->key_bytes = (long long)sizeof(PyObject);
        return 0;
    }
    entry->key_bytes = PyLong_AsLongLong(size);
    Py_DECREF(size);
    return entry->key_bytes == -1 && PyErr_Occurred() ? -1 : 0;
}

static Entry *
entry_at(Tier *self, PyObject *key)
{
    PyObject *found = PyDict_GetItemWithError(self->entries, key);
    if (found != NULL && !Py_IS_TYPE(found, &Entry_Type)) {
        PyErr_SetString(PyExc_TypeError, "the entries of a tier were written to by somebody else");
        return NULL;
    }
    return (Entry *)found;
}

int
tier_add(Tier *self, Entry *entry)
{
    if (entry->alive) {
        PyErr_Format(PyExc_ValueError, "%R is in a tier already", entry);
        return -1;
    }
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "a key's __hash__, __eq__ or __sizeof__ changed the chest that it is looked up in");
        return -1;
    }
    self->busy = 1;
    Entry *old = (Entry *)Py_XNewRef((PyObject *)entry_at(self, entry->key));
    int bad = old == NULL ? PyErr_Occurred() || measure_key(entry) < 0 : 0;
    bad = bad || PyDict_SetItem(self->entries, old == NULL ? entry->key : old->key, (PyObject *)entry) < 0;
    self->busy = 0;
    if (bad) {
        Py_XDECREF(old);
        return -1;
    }
    PyObject *key = NULL;
    long long values = entry->size, bookkeeping = entry_bytes;
    if (old != NULL) {
        key = entry->key;
        entry->key = Py_NewRef(old->key);
        entry->key_bytes = old->key_bytes;
        entry->f = old->f;
    }
    bookkeeping += entry->key_bytes;
    if (old != NULL && old->alive) { /* else it was taken out while its key was looked up */
        /* It takes the very place of the old one, and is queued anew from there. */
        unlink_entry(self, old);
        old->alive = 0;
        values -= old->size;
        bookkeeping = 0;
        Py_DECREF(old); /* the list's */
    }
    entry->alive = 1;
    append_entry(self, (Entry *)Py_NewRef(entry), class_of(self, entry));
    count_bytes(self, values, bookkeeping);
    Py_XDECREF(key);
    Py_XDECREF(old);
    return 0;
}

/* The entry, which was in the tier, as a reference of the caller's. */
static int
take_out(Tier *self, Entry *entry)
{
    char busy = self->busy;
    Py_INCREF(entry);
    self->busy = 1; /* else another one could come under its key, and be lost */
    int bad = PyDict_DelItem(self->entries, entry->key) < 0;
    self->busy = busy;
    if (bad && (entry->alive || !PyErr_ExceptionMatches(PyExc_KeyError))) {
        Py_DECREF(entry);
        return -1;
    }
    if (!entry->alive) { /* it was taken out while its key was looked up */
        PyErr_Clear();
        return 0;
    }
    entry->alive = 0;
    unlink_entry(self, entry);
    count_bytes(self, -entry->size, -(entry->key_bytes + entry_bytes));
    Py_DECREF(entry); /* the list's; the caller has another one */
    return 0;
}

static int
expect_entry(PyObject *object)
{
    if (!Py_IS_TYPE(object, &Entry_Type)) {
        PyErr_Format(PyExc_TypeError, "an Entry is needed, not %.100s", Py_TYPE(object)->tp_name);
        return -1;
    }
    return 0;
}

static PyObject *
Tier_add(Tier *self, PyObject *entry)
{
    if (expect_entry(entry) < 0 || tier_add(self, (Entry *)entry) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
Tier_remove(Tier *self, PyObject *key)
{
    Entry *entry = entry_at(self, key);
    if (entry == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    return take_out(self, entry) < 0 ? NULL : (PyObject *)entry;
}

/* Whether a clean value has not changed, and nobody can change it any more. What is looked at is looked at in one step. */
static int
is_done_with(Entry *entry)
{
    return entry->baseline == Py_None || (!entry->hot && !entry->lent) ||
           (held_at_a_glance(entry) == 0 && picture_matches(entry->baseline, entry->value));
}

static PyObject *
Tier_let_go(Tier *self, PyObject *batch)
{
    if (!PyList_CheckExact(batch)) {
        PyErr_SetString(PyExc_TypeError, "a list of entries is needed");
        return NULL;
    }
    PyObject *others = PyList_New(0);
    for (Py_ssize_t i = 0; others != NULL && i < PyList_GET_SIZE(batch); i++) {
        Entry *entry = (Entry *)Py_NewRef(PyList_GET_ITEM(batch, i));
        int bad = expect_entry((PyObject *)entry);
        if (!bad && !entry->dirty && entry->alive && is_done_with(entry)) {
            bad = take_out(self, entry);
            if (!bad) {
                Py_DECREF(entry);
            }
        }
        else if (!bad) {
            bad = PyList_Append(others, (PyObject *)entry);
        }
        Py_DECREF(entry);
        if (bad) {
            Py_CLEAR(others);
        }
    }
    return others;
}

static PyObject *
Tier_queued(Tier *self, PyObject *args)
{
    PyObject *entries;
    long long largest, room;
    if (!PyArg_ParseTuple(args, "O!LL:queued", &PyDict_Type, &entries, &largest, &room)) {
        return NULL;
    }
    PyObject *found = PyList_New(0), *key, *value;
    Py_ssize_t at = 0;
    while (found != NULL && PyDict_Next(entries, &at, &key, &value)) {
        Entry *entry = (Entry *)value;
        if (Py_IS_TYPE(value, &Entry_Type) && entry->alive && entry->list < N_CLASSES && entry->size <= largest) {
            room -= entry->size;
            if (room < 0) {
                break;
            }
            if (PyList_Append(found, value) < 0) {
                Py_CLEAR(found);
            }
        }
    }
    (void)self;
    return found;
}

static PyObject *
Tier_resize(Tier *self, PyObject *args)
{
    Entry *entry;
    PyObject *number;
    if (!PyArg_ParseTuple(args, "O!O:resize", &Entry_Type, &entry, &number)) {
        return NULL;
    }
    long long size = as_size(number);
    if (size == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (entry->alive) {
        long long more = size - entry->size;
        unlink_entry(self, entry); /* counts the old size, if it was stuck */
        entry->size = size;
        append_entry(self, entry, class_of(self, entry));
        count_bytes(self, more, 0);
    }
    entry->size = size;
    Py_RETURN_NONE;
}

static PyObject *
Tier_mark(Tier *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entry", "dirty", NULL};
    Entry *entry;
    int dirty;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!p:mark", names, &Entry_Type, &entry, &dirty)) {
        return NULL;
    }
    if (entry->dirty != dirty) {
        entry->dirty = (char)dirty;
        if (entry->alive && (dirty ? entry->list < N_CLASSES : entry->round == self->round)) {
            queue_again(self, entry);
        }
    }
    Py_RETURN_NONE;
}

static void
count_fresh(Tier *self, const Entry *entry)
{
    if (entry->f == 0) {
        self->hit_fresh += (entry->hot ? ONE >> WINDOW : 0) - (self->hit_fresh >> WINDOW);
    }
}

/* An entry that was hit stays: one more use is counted, and it is queued again. */
static int
give_second_chance(Tier *self, Entry *entry)
{
    entry->lent = 1;
    entry->hot = 0;
    if (entry->f < MAX_USES) {
        entry->f++;
    }
    queue_again(self, entry);
    if (self->on_second_chance == Py_None) {
        return 0;
    }
    Py_INCREF(entry);
    PyObject *result = PyObject_CallOneArg(self->on_second_chance, (PyObject *)entry);
    Py_DECREF(entry);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static PyObject *
Tier_victims(Tier *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"target", "spare", "enough", NULL};
    PyObject *target_object, *spare_object = Py_None, *enough_object = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:victims", names, &target_object, &spare_object, &enough_object)) {
        return NULL;
    }
    long long target = as_size(target_object), enough = enough_object == Py_None ? target : as_size(enough_object);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (spare_object != Py_None && expect_entry(spare_object) < 0) {
        return NULL;
    }
    Entry *spare = spare_object == Py_None ? NULL : (Entry *)spare_object;
    PyObject *batch = PyList_New(0);
    if (batch == NULL || self->usage <= target) {
        return batch;
    }
    splice_first(self, PICKED);
    long long picked_values = 0, picked_bookkeeping = 0, least = 0; /* no head is 0 */
    int chances = 0, i = 0;
    while (1) {
        long long left = self->values - picked_values, bookkeeping = self->bookkeeping - picked_bookkeeping;
        left += bookkeeping > self->free ? bookkeeping - self->free : 0;
        if (left <= target || (left <= enough && PyList_GET_SIZE(batch) >= BATCH)) {
            break;
        }
        if (self->heads[i] != least) { /* else no other has become less: what is queued anew stands for more */
            i = 0;
            for (int j = 1; j <= FIRST; j++) {
                if (self->heads[j] < self->heads[i]) {
                    i = j;
                }
            }
            least = self->heads[i];
            if (least == NEVER) {
                break;
            }
            if (least > self->floor) {
                self->floor = least;
            }
        }
        Entry *entry = ENTRY_OF(self->ends[i].next);
        if (entry == spare) {
            move_entry(self, entry, PICKED);
            continue;
        }
        count_fresh(self, entry);
        if (entry->hot && chances < SECOND_CHANCES) {
            chances++;
            if (give_second_chance(self, entry) < 0) {
                Py_CLEAR(batch);
                break;
            }
        }
        else {
            chances = 0;
            if (PyList_Append(batch, (PyObject *)entry) < 0) {
                Py_CLEAR(batch);
                break;
            }
            move_entry(self, entry, PICKED);
            picked_values += entry->size;
            picked_bookkeeping += entry->key_bytes + entry_bytes;
        }
    }
    if (spare != NULL && spare->alive && spare->list == PICKED) {
        queue_again(self, spare);
    }
    return batch;
}

static PyObject *
Tier_keep(Tier *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entry", "stuck", NULL};
    Entry *entry;
    int stuck = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|p:keep", names, &Entry_Type, &entry, &stuck)) {
        return NULL;
    }
    if (entry->alive && stuck) {
        move_entry(self, entry, STUCK);
        entry->round = self->round;
        self->stuck_bytes += entry->size;
    }
    else if (entry->alive) {
        queue_again(self, entry);
    }
    Py_RETURN_NONE;
}

static PyObject *
Tier_retry(Tier *self, PyObject *Py_UNUSED(ignored))
{
    splice_first(self, STUCK);
    self->round++;
    self->stuck_bytes = 0;
    Py_RETURN_NONE;
}

static PyObject *
Tier_clear(Tier *self, PyObject *Py_UNUSED(ignored))
{
    empty(self);
    Py_RETURN_NONE;
}

#define CHECK(condition)                                                                                                       \
    if (!(condition)) {                                                                                                        \
        PyErr_Format(PyExc_AssertionError, "the tier is not whole: %s", #condition);                                           \
        return NULL;                                                                                                           \
    }

static PyObject *
Tier_check(Tier *self, PyObject *Py_UNUSED(ignored))
{
    long long values = 0, bookkeeping = 0, stuck_bytes = 0;
    Py_ssize_t n = 0;
    for (int i = 0; i < N_LISTS; i++) {
        const Link *before = &self->ends[i];
        long long floor = 0;
        for (Link *at = before->next; at != &self->ends[i]; before = at, at = at->next, n++) {
            Entry *entry = ENTRY_OF(at);
            CHECK(at->prev == before);
            CHECK(entry->alive);
            CHECK(entry_at(self, entry->key) == entry);
            CHECK(i < N_CLASSES ? entry->list == i : entry->list == i || (i == FIRST && entry->list >= PICKED));
            CHECK(i >= N_CLASSES || (floor <= entry->floor && entry->floor <= self->floor));
            CHECK((entry->round == self->round) == (i == STUCK));
            CHECK(0 <= entry->f && entry->f <= MAX_USES && entry->size >= 0);
            floor = entry->floor;
            stuck_bytes += i == STUCK ? entry->size : 0;
            values += entry->size;
            bookkeeping += entry->key_bytes + entry_bytes;
        }
        CHECK(self->ends[i].prev == before);
        if (i <= FIRST) {
            long long head = self->heads[i];
            find_head(self, i);
            CHECK(self->heads[i] == head);
        }
    }
    CHECK(n == PyDict_GET_SIZE(self->entries));
    CHECK(stuck_bytes == self->stuck_bytes);
    CHECK(0 <= self->hit_fresh && self->hit_fresh <= ONE);
    CHECK(values == self->values);
    CHECK(bookkeeping == self->bookkeeping);
    CHECK(self->usage == values + (bookkeeping > self->free ? bookkeeping - self->free : 0));
    Py_RETURN_NONE;
}

static PyObject *
Tier_get_limit(Tier *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(self->limit);
}

static int
Tier_set_limit(Tier *self, PyObject *number, void *Py_UNUSED(closure))
{
    if (number == NULL) {
        PyErr_SetString(PyExc_TypeError, "limit cannot be deleted");
        return -1;
    }
    long long limit = as_size(number);
    if (limit == -1 && PyErr_Occurred()) {
        return -1;
    }
    self->limit = limit;
    return 0;
}

static PyGetSetDef Tier_getset[] = {
    {"limit", (getter)Tier_get_limit, (setter)Tier_set_limit, NULL, NULL},
    {NULL},
};

static PyMemberDef Tier_members[] = {
    {"entries", T_OBJECT_EX, offsetof(Tier, entries), READONLY, NULL},
    {"on_second_chance", T_OBJECT_EX, offsetof(Tier, on_second_chance), 0, NULL},
    {"usage", T_LONGLONG, offsetof(Tier, usage), READONLY, NULL},
    {"stuck_bytes", T_LONGLONG, offsetof(Tier, stuck_bytes), READONLY, NULL},
    {NULL},
};

static PyMethodDef Tier_methods[] = {
    {"add", (PyCFunction)Tier_add, METH_O, NULL},
    {"remove", (PyCFunction)Tier_remove, METH_O, NULL},
    {"let_go", (PyCFunction)Tier_let_go, METH_O, NULL},
    {"queued", (PyCFunction)Tier_queued, METH_VARARGS, NULL},
    {"resize", (PyCFunction)Tier_resize, METH_VARARGS, NULL},
    {"mark", (PyCFunction)(void (*)(void))Tier_mark, METH_VARARGS | METH_KEYWORDS, NULL},
    {"victims", (PyCFunction)(void (*)(void))Tier_victims, METH_VARARGS | METH_KEYWORDS, NULL},
    {"keep", (PyCFunction)(void (*)(void))Tier_keep, METH_VARARGS | METH_KEYWORDS, NULL},
    {"retry", (PyCFunction)Tier_retry, METH_NOARGS, NULL},
    {"clear", (PyCFunction)Tier_clear, METH_NOARGS, NULL},
    {"check", (PyCFunction)Tier_check, METH_NOARGS, NULL},
    {NULL},
};

static PySequenceMethods Tier_as_sequence = {.sq_length = (lenfunc)Tier_length};

PyTypeObject Tier_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "chest._native.MemoryTier",
    .tp_doc = "The entries in memory, at most `limit` bytes of them, and the order in which they leave.",
    .tp_basicsize = sizeof(Tier),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_weaklistoffset = offsetof(Tier, weakrefs),
    .tp_new = Tier_new,
    .tp_dealloc = (destructor)Tier_dealloc,
    .tp_traverse = (traverseproc)Tier_traverse,
    .tp_clear = (inquiry)Tier_clear_refs,
    .tp_as_sequence = &Tier_as_sequence,
    .tp_methods = Tier_methods,
    .tp_members = Tier_members,
    .tp_getset = Tier_getset,
};

int
tier_ready(PyObject *module)
{
    PyObject *sys = PyImport_ImportModule("sys");
    if (sys == NULL) {
        return -1;
    }
    getsizeof = PyObject_GetAttrString(sys, "getsizeof");
    Py_DECREF(sys);
    if (getsizeof == NULL || PyType_Ready(&Entry_Type) < 0 || PyType_Ready(&Tier_Type) < 0) {
        return -1;
    }
    Py_INCREF(&Entry_Type);
    Py_INCREF(&Tier_Type);
    return PyModule_AddObject(module, "Entry", (PyObject *)&Entry_Type) < 0 ||
                   PyModule_AddObject(module, "MemoryTier", (PyObject *)&Tier_Type) < 0
               ? -1
               : 0;
}
