(using_directive !name [(identifier) (qualified_name)] @import)
(using_directive name: (_) [(qualified_name)] @import)
(namespace_declaration name: (_) @package)
(file_scoped_namespace_declaration name: (_) @package)

(compilation_unit [(class_declaration name: (_) @define) (struct_declaration name: (_) @define)
                   (interface_declaration name: (_) @define) (enum_declaration name: (_) @define)
                   (record_declaration name: (_) @define) (delegate_declaration name: (_) @define)])
(namespace_declaration body: (declaration_list
  [(class_declaration name: (_) @define) (struct_declaration name: (_) @define)
   (interface_declaration name: (_) @define) (enum_declaration name: (_) @define)
   (record_declaration name: (_) @define) (delegate_declaration name: (_) @define)]))

(namespace_declaration body: (_) @members) @signature
(class_declaration body: (_) @members) @signature
(struct_declaration body: (_) @members) @signature
(interface_declaration body: (_) @members) @signature
(record_declaration body: (_)? @members) @signature
(enum_declaration body: (_) @body) @signature
(delegate_declaration) @signature
(method_declaration body: (_)? @body) @signature
(constructor_declaration body: (_) @body) @signature
(property_declaration) @signature

[(block) (if_statement) (for_statement) (foreach_statement) (while_statement) (do_statement) (try_statement)
 (switch_statement) (using_statement) (lock_statement) (return_statement) (throw_statement)
 (expression_statement) (local_declaration_statement) (method_declaration) (constructor_declaration)
 (property_declaration) (field_declaration) (class_declaration) (catch_clause) (finally_clause)
 (switch_section) (argument_list) (using_directive)] @span
(if_statement alternative: (_) @span)
(assignment_expression right: (_) @span)
