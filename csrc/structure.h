// A record of the structure of a tree of torch.nn modules, without the values of its tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace focalnet {

// A record of everything that determines the effect of calling a module: the classes of the module and of all modules
// in it, their names and order, their plain attributes (flags, numbers, strings), whether they have hooks, and the
// class, dtype, layout and device of every parameter. For any other attribute only the class is recorded. If `forward`
// is replaced by a functools.partial, its keywords are recorded too.
//
// Whatever was derived from these facts alone stays valid as long as `parameters_of` finds no difference. The record
// does not keep modules or tensors alive.
class Structure {
  public:
    explicit Structure(pybind11::handle module);

    // A list of the parameters of `module` in the order of the record (None for those that are None), or None if
    // anything differs from the record.
    pybind11::object parameters_of(pybind11::handle module) const;

  private:
    enum class Kind { value, type, keywords, is_empty, parameters, modules, ignored };

    // An attribute of a module, an item of one of its dictionaries, or a fact of a parameter.
    struct Entry {
        Kind kind;
        pybind11::object name;
        pybind11::object value;  // the value itself, or its class; None for a dictionary
        Py_ssize_t size;         // number of items of a dictionary
    };

    void record(Kind kind, PyObject* name, PyObject* value, Py_ssize_t size = 0);
    void record_module(PyObject* name, PyObject* module);
    void record_parameter(PyObject* name, PyObject* tensor);
    void record_attribute(PyObject* name, PyObject* value);

    using Cursor = std::vector<Entry>::const_iterator;
    static bool matches_module(Cursor& next, PyObject* name, PyObject* module, PyObject* found);
    static bool matches_parameter(Cursor& next, PyObject* name, PyObject* tensor, PyObject* found);
    static bool matches_attribute(Cursor& next, PyObject* name, PyObject* value, PyObject* found);

    // Note the cache lines that a comparison reads, for prefetching. By the next call, operators have evicted them,
    // and loading them one by one would take most of the comparison's time. An address may be stale by then, but
    // prefetching a stale address is harmless.
    void note_object(const PyObject* object);
    void note_dictionary(PyObject* dictionary);
    void note(const void* address, size_t bytes);

    std::vector<Entry> entries_;
    std::vector<const char*> cache_lines_;
    bool is_complete_ = true;  // false if something could not be recorded; then no module matches
    int depth_ = 0;            // nesting depth of the module being recorded
};

}  // namespace focalnet
