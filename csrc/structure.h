// What a tree of torch.nn modules is made of, apart from the numbers in its tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace focalnet {

// A record of what decides what calling a module does: the classes of the module and of all modules in it, their names
// and order, their plain attributes (flags, numbers, strings), whether they have hooks, and the class, dtype, layout
// and device type of every parameter. Of an attribute of another kind only its class is recorded, and of a forward
// that is a functools.partial its keywords as well.
//
// A question that reads nothing else has the same answer for as long as `parameters_of` finds no difference. The
// record keeps neither modules nor tensors alive.
class Structure {
  public:
    explicit Structure(pybind11::handle module);

    // The parameters of `module` in the order of the walk, None for those that are None; or None in all, where
    // anything differs from the record.
    pybind11::object parameters_of(pybind11::handle module) const;

  private:
    enum class Kind { value, type, keywords, is_empty, parameters, modules, ignored };

    // An attribute of a module, an item of one of its dictionaries, or a fact of a parameter.
    struct Entry {
        Kind kind;
        pybind11::object name;
        pybind11::object value;  // the value itself, or its class; nothing for a dictionary
        Py_ssize_t size;         // of a dictionary
    };

    void record(Kind kind, PyObject* name, PyObject* value, Py_ssize_t size = 0);
    void record_module(PyObject* name, PyObject* module);
    void record_parameter(PyObject* name, PyObject* tensor);
    void record_attribute(PyObject* name, PyObject* value);

    using Cursor = std::vector<Entry>::const_iterator;
    static bool matches_module(Cursor& next, PyObject* name, PyObject* module, PyObject* found);
    static bool matches_parameter(Cursor& next, PyObject* name, PyObject* tensor, PyObject* found);
    static bool matches_attribute(Cursor& next, PyObject* name, PyObject* value, PyObject* found);

    // Notes the cache lines that a comparison reads. By the next call an operator has evicted them all, and one after
    // the other they would be most of the time. An address may be stale by then: prefetching one does no harm.
    void note_object(const PyObject* object);
    void note_dictionary(PyObject* dictionary);
    void note(const void* address, size_t bytes);

    std::vector<Entry> entries_;
    std::vector<const char*> cache_lines_;
    bool is_complete_ = true;  // false where something could not be recorded: then nothing matches
    int depth_ = 0;            // of the module that is being recorded
};

}  // namespace focalnet
