(import_spec path: (interpreted_string_literal) @import)
(package_clause (package_identifier) @package)

(source_file [(function_declaration name: (identifier) @define)
              (type_declaration [(type_spec name: (_) @define) (type_alias name: (_) @define)])
              (var_declaration (var_spec name: (identifier) @define))
              (const_declaration (const_spec name: (identifier) @define))])

(function_declaration body: (_)? @body) @signature
(method_declaration body: (_)? @body) @signature
(source_file (type_declaration) @signature)

[(block) (if_statement) (for_statement) (expression_switch_statement) (type_switch_statement)
 (select_statement) (return_statement) (expression_statement) (go_statement) (defer_statement)
 (assignment_statement) (short_var_declaration) (var_declaration) (const_declaration) (type_declaration)
 (function_declaration) (method_declaration) (expression_case) (type_case) (communication_case)
 (argument_list) (literal_value)] @span
(if_statement alternative: (_) @span)
(assignment_statement right: (_) @span)
(short_var_declaration right: (_) @span)
